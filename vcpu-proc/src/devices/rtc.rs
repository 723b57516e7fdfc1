//! The real-time clock of a PC, an mc146818 with 128 bytes of CMOS RAM. It runs on UTC, from the host's clock; a guest
//! that sets it changes its distance to the host's clock. It raises no interrupts: there is no alarm and no periodic
//! tick.

use crate::bus::BusDevice;
use crate::outbox::Outbox;
use ipc::memory::{HIGH_RAM_START, LOW_RAM_END};
use ipc::vcpu::VcpuEvent;
use std::time::SystemTime;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Where PC firmware keeps the century; FADT's CENTURY field may name it.
const CENTURY: u8 = 0x32;

/// 32.768 kHz time base, 1024 Hz periodic rate.
const STATUS_A_DEFAULT: u8 = 0x26;
/// 24-hour mode, BCD.
const STATUS_B_DEFAULT: u8 = STATUS_B_24_HOURS;
const STATUS_B_24_HOURS: u8 = 1 << 1;
const STATUS_B_BINARY: u8 = 1 << 2;
/// Updates are held while the guest sets the clock.
const STATUS_B_SET: u8 = 1 << 7;
/// RAM and time are valid: the battery is good.
const STATUS_D_VALID: u8 = 1 << 7;

const HOUR_PM: u8 = 1 << 7;
const CMOS_BYTES: usize = 128;

/// See the module.
pub struct Rtc {
    index: u8,
    ram: [u8; CMOS_BYTES],
    /// Guest time minus host time, seconds.
    offset: i64,
    /// The time while STATUS_B_SET holds it.
    held: Option<Time>,
    now: fn() -> i64,
    outbox: Outbox,
    /// A change was reported, and nobody has asked for it yet.
    reported: bool,
}

/// A point in time as the registers split it, plain numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Time {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

fn host_seconds() -> i64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

impl Rtc {
    /// The clock of a machine with that much RAM. `outbox` is told when the guest sets it.
    pub fn new(ram_bytes: u64, outbox: Outbox) -> Self {
        let mut ram = [0; CMOS_BYTES];
        let low = ram_bytes.min(LOW_RAM_END);
        let mut put = |register: usize, bytes: usize, value: u64| {
            let limited = value.min((1 << (8 * bytes)) - 1);
            ram[register..register + bytes].copy_from_slice(&limited.to_le_bytes()[..bytes]);
        };
        // Base memory in KiB; memory above 1 MiB in KiB, twice; above 16 MiB in 64 KiB; above 4 GiB in 64 KiB.
        put(0x15, 2, 640);
        let above_1_mib = low.saturating_sub(1 << 20) >> 10;
        put(0x17, 2, above_1_mib);
        put(0x30, 2, above_1_mib);
        put(0x34, 2, low.saturating_sub(16 << 20) >> 16);
        put(0x5b, 3, ram_bytes.saturating_sub(low) >> 16);
        const { assert!(LOW_RAM_END < HIGH_RAM_START) };
        let mut rtc = Self {
            index: 0,
            ram,
            offset: 0,
            held: None,
            now: host_seconds,
            outbox,
            reported: false,
        };
        rtc.reset();
        rtc
    }

    /// How far the guest has set it from the host's clock, seconds. The next change will be reported again.
    pub fn take_offset(&mut self) -> i64 {
        self.reported = false;
        self.offset
    }

    fn time(&self) -> Time {
        self.held
            .unwrap_or_else(|| Time::from_unix((self.now)().saturating_add(self.offset)))
    }

    fn set_time(&mut self, time: Time) {
        if self.held.is_some() {
            self.held = Some(time);
        } else {
            self.offset = time.to_unix().saturating_sub((self.now)());
            if !self.reported {
                self.reported = true;
                self.outbox.send(VcpuEvent::RtcChanged);
            }
        }
    }

    fn read_register(&mut self, register: u8) -> u8 {
        let time = self.time();
        match register {
            SECONDS => self.encode(time.second),
            MINUTES => self.encode(time.minute),
            HOURS => self.encode_hour(time.hour),
            WEEKDAY => self.encode(time.weekday()),
            DAY => self.encode(time.day),
            MONTH => self.encode(time.month),
            YEAR => self.encode(small(time.year.rem_euclid(100))),
            CENTURY => self.encode(small(time.year.div_euclid(100).rem_euclid(100))),
            // No interrupt is ever pending.
            STATUS_C => 0,
            STATUS_D => STATUS_D_VALID,
            _ => self.ram[usize::from(register)],
        }
    }

    fn write_register(&mut self, register: u8, value: u8) {
        let number = self.decode(value);
        let mut time = self.time();
        match register {
            SECONDS => time.second = number,
            MINUTES => time.minute = number,
            HOURS => time.hour = self.decode_hour(value),
            DAY => time.day = number,
            MONTH => time.month = number,
            YEAR => time.year = time.year.div_euclid(100) * 100 + i64::from(number),
            CENTURY => time.year = i64::from(number) * 100 + time.year.rem_euclid(100),
            // The weekday follows from the date; C and D are read-only.
            WEEKDAY | STATUS_C | STATUS_D => return,
            // Bit 7, update in progress, is the clock's.
            STATUS_A => return self.ram[usize::from(register)] = value & 0x7f,
            STATUS_B => return self.write_status_b(value),
            _ => return self.ram[usize::from(register)] = value,
        }
        self.set_time(time);
    }

    fn write_status_b(&mut self, value: u8) {
        let held = self.held.take();
        if value & STATUS_B_SET != 0 {
            self.held = Some(held.unwrap_or_else(|| self.time()));
        } else if let Some(time) = held {
            self.set_time(time);
        }
        self.ram[usize::from(STATUS_B)] = value;
    }

    fn status_b(&self) -> u8 {
        self.ram[usize::from(STATUS_B)]
    }

    fn encode(&self, number: u8) -> u8 {
        if self.status_b() & STATUS_B_BINARY != 0 {
            number
        } else {
            ((number / 10 % 10) << 4) | (number % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.status_b() & STATUS_B_BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 0xf)
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.status_b() & STATUS_B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let twelve = (hour + 11) % 12 + 1;
        self.encode(twelve) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.status_b() & STATUS_B_24_HOURS != 0 {
            return self.decode(value);
        }
        self.decode(value & !HOUR_PM) % 12 + if value & HOUR_PM != 0 { 12 } else { 0 }
    }
}

/// For numbers known to be below 100.
fn small(number: i64) -> u8 {
    u8::try_from(number).unwrap_or(0)
}

impl Time {
    /// Civil date in the proleptic Gregorian calendar. The year starts in March, so that the leap day is its last.
    fn from_unix(seconds: i64) -> Self {
        let days = seconds.div_euclid(86_400);
        let of_day = seconds.rem_euclid(86_400);
        // Day 0 of this count is 0000-03-01; 146097 days are 400 years.
        let days = days.saturating_add(719_468);
        let era = days.div_euclid(146_097);
        let day_of_era = days.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = (month_from_march + 2) % 12 + 1;
        Self {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month: small(month),
            day: small(day_of_year - (153 * month_from_march + 2) / 5 + 1),
            hour: small(of_day / 3600),
            minute: small(of_day / 60 % 60),
            second: small(of_day % 60),
        }
    }

    /// The days since 1970-01-01. Fields out of range carry over, as the guest may write anything.
    fn days(&self) -> i64 {
        let month = i64::from(self.month.max(1)) - 1;
        let year = self.year + month / 12 - i64::from(month % 12 < 2);
        let month_from_march = (month % 12 + 10) % 12;
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(self.day) - 1;
        era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
    }

    fn to_unix(self) -> i64 {
        self.days() * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }

    /// 1 is Sunday.
    fn weekday(&self) -> u8 {
        // 1970-01-01 was a Thursday.
        small((self.days() + 4).rem_euclid(7) + 1)
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        // The index register is write-only on most boards.
        if offset == 1 {
            data[0] = self.read_register(self.index);
        }
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        match offset {
            // Bit 7 masks NMIs on a PC; the rest selects.
            0 => {
                self.index = data[0] & 0x7f;
                // A word write selects and writes at once.
                if let Some(value) = data.get(1) {
                    self.write_register(self.index, *value);
                }
            }
            _ => self.write_register(self.index, data[0]),
        }
    }

    /// A reset of the machine leaves the battery-backed time and RAM alone.
    fn reset(&mut self) {
        self.index = 0;
        if let Some(time) = self.held.take() {
            self.set_time(time);
        }
        self.ram[usize::from(STATUS_A)] = STATUS_A_DEFAULT;
        self.ram[usize::from(STATUS_B)] = STATUS_B_DEFAULT;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    fn leap_day() -> i64 {
        1_709_251_198
    }

    fn clock() -> Rtc {
        Rtc {
            now: leap_day,
            ..Rtc::new(5 << 30, Outbox::new().unwrap())
        }
    }

    fn get(rtc: &mut Rtc, register: u8) -> u8 {
        rtc.write(0x70, 0, &[register | 0x80]);
        let mut data = [0xff];
        rtc.read(0x70, 1, &mut data);
        data[0]
    }

    fn set(rtc: &mut Rtc, register: u8, value: u8) {
        rtc.write(0x70, 0, &[register]);
        rtc.write(0x70, 1, &[value]);
    }

    #[test]
    fn the_time_is_utc_in_bcd_and_24_hours() {
        let mut rtc = clock();
        let registers = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];
        assert_eq!(
            registers.map(|register| get(&mut rtc, register)),
            [0x58, 0x59, 0x23, 0x05, 0x29, 0x02, 0x24, 0x20]
        );
        assert_eq!(get(&mut rtc, STATUS_A) & 0x80, 0, "no update in progress");
        assert_eq!(get(&mut rtc, STATUS_D), 0x80);
    }

    #[test]
    fn binary_and_12_hour_modes_are_followed() {
        let mut rtc = clock();
        set(&mut rtc, STATUS_B, STATUS_B_BINARY);
        assert_eq!(get(&mut rtc, HOURS), 11 | HOUR_PM);
        assert_eq!(get(&mut rtc, SECONDS), 58);
        set(&mut rtc, HOURS, 12);
        assert_eq!(rtc.time().hour, 0);
        set(&mut rtc, HOURS, 12 | HOUR_PM);
        assert_eq!(rtc.time().hour, 12);
    }

    #[test]
    fn setting_the_clock_holds_until_it_is_released_and_survives_a_reset() {
        let mut rtc = clock();
        set(&mut rtc, STATUS_B, STATUS_B_24_HOURS | STATUS_B_SET);
        for (register, value) in [(YEAR, 0x99), (CENTURY, 0x19), (MONTH, 0x12), (DAY, 0x31), (HOURS, 0x08)] {
            set(&mut rtc, register, value);
        }
        set(&mut rtc, STATUS_B, STATUS_B_24_HOURS);
        rtc.reset();
        let time = rtc.time();
        assert_eq!((time.year, time.month, time.day, time.hour), (1999, 12, 31, 8));
        assert_eq!(get(&mut rtc, WEEKDAY), 6, "a Friday");
    }

    #[test]
    fn many_changes_are_reported_once_until_somebody_asks() {
        let mut rtc = clock();
        let reports = |rtc: &Rtc| rtc.outbox.take().len();
        for second in 0..40 {
            set(&mut rtc, SECONDS, second % 10);
        }
        assert_eq!(reports(&rtc), 1);
        set(&mut rtc, STATUS_B, STATUS_B_24_HOURS | STATUS_B_SET);
        set(&mut rtc, SECONDS, 0x30);
        assert_eq!(
            rtc.take_offset(),
            9 - 58,
            "the clock is held: the earlier change counts"
        );
        assert_eq!(reports(&rtc), 0);
        set(&mut rtc, STATUS_B, STATUS_B_24_HOURS);
        assert_eq!(reports(&rtc), 1);
        assert_eq!(rtc.take_offset(), 30 - 58);
    }

    #[test]
    fn memory_sizes_are_where_firmware_puts_them() {
        let mut rtc = clock();
        let word = |rtc: &mut Rtc, register| u32::from(get(rtc, register)) | u32::from(get(rtc, register + 1)) << 8;
        assert_eq!(word(&mut rtc, 0x15), 640);
        assert_eq!(word(&mut rtc, 0x17), 0xffff);
        assert_eq!(word(&mut rtc, 0x34), (3 << 14) - 256);
        assert_eq!(word(&mut rtc, 0x5b), 2 << 14);
        // A byte of the guest's own.
        set(&mut rtc, 0x0f, 0x5a);
        assert_eq!(get(&mut rtc, 0x0f), 0x5a);
    }

    proptest! {
        #[test]
        fn dates_convert_back_and_forth(seconds in -62_135_596_800i64..253_402_300_800) {
            let time = Time::from_unix(seconds);
            prop_assert_eq!(time.to_unix(), seconds);
            prop_assert!((1..=12).contains(&time.month) && (1..=31).contains(&time.day));
        }

        #[test]
        fn no_sequence_of_accesses_panics(accesses in proptest::collection::vec((any::<bool>(), 0..2u64, any::<[u8; 2]>(), 1..3usize), 0..200)) {
            let mut rtc = clock();
            for (is_read, offset, mut bytes, length) in accesses {
                let length = length.min(2 - offset as usize);
                if is_read {
                    rtc.read(0x70, offset, &mut bytes[..length]);
                } else {
                    rtc.write(0x70, offset, &bytes[..length]);
                }
            }
        }
    }
}
