//! Registers as a driver programs them; and what a hostile one may try.

use super::*;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const FLUSH: u64 = 1 << 9;
const QUEUE_SIZE: u16 = 256;
const SET_UP: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK;

fn transport() -> Transport {
    let mut transport = Transport::new(4, QUEUE_SIZE, 5);
    transport.offer(VERSION_1 | FLUSH | 1 << VIRTIO_F_RING_PACKED);
    transport
}

fn set(transport: &mut Transport, offset: usize, value: u32) {
    assert_eq!(transport.write(offset as u64, &value.to_le_bytes()), None);
}

fn set16(transport: &mut Transport, offset: usize, value: u16) -> Option<Effect> {
    transport.write(offset as u64, &value.to_le_bytes())
}

fn get(transport: &Transport, offset: usize, bytes: usize) -> u64 {
    let mut data = [0; 8];
    transport.read(offset as u64, &mut data[..bytes]);
    u64::from_le_bytes(data)
}

fn set_status(transport: &mut Transport, status: u8) -> Option<Effect> {
    transport.write(register::STATUS as u64, &[status])
}

fn status(transport: &Transport) -> u8 {
    get(transport, register::STATUS, 1).to_le_bytes()[0]
}

fn negotiate(transport: &mut Transport, features: u64) {
    assert_eq!(set_status(transport, ACKNOWLEDGE), None);
    assert_eq!(set_status(transport, ACKNOWLEDGE | DRIVER), None);
    for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
        set(transport, register::DRIVER_FEATURE_SELECT, select);
        set(transport, register::DRIVER_FEATURE, u32::try_from(half).unwrap());
    }
    assert_eq!(set_status(transport, SET_UP), None);
}

fn set_queue(transport: &mut Transport, queue: u16, base: u64) {
    set16(transport, register::QUEUE_SELECT, queue);
    set16(transport, register::QUEUE_SIZE, 128);
    for (offset, address) in [
        (register::QUEUE_DESC, base),
        (register::QUEUE_DRIVER, base + 0x1000),
        (register::QUEUE_DEVICE, base + 0x2000),
    ] {
        set(transport, offset, u32::try_from(address & 0xffff_ffff).unwrap());
        set(transport, offset + 4, u32::try_from(address >> 32).unwrap());
    }
    set16(transport, register::QUEUE_ENABLE, 1);
}

/// A device that its driver has just started, with queues 0 and 2.
fn started() -> (Transport, Activation) {
    let mut transport = transport();
    negotiate(&mut transport, VERSION_1 | FLUSH);
    set_queue(&mut transport, 0, 0x10_0000);
    set_queue(&mut transport, 2, 0x1_0000_0000);
    let Some(Effect::Activate(activation)) = set_status(&mut transport, SET_UP | DRIVER_OK) else {
        panic!("no activation");
    };
    (transport, activation)
}

#[test]
fn the_driver_finds_what_is_offered() {
    let mut transport = transport();
    assert_eq!(get(&transport, 0x04, 4), FLUSH, "the packed ring is not ours to offer");
    set(&mut transport, register::DEVICE_FEATURE_SELECT, 1);
    assert_eq!(get(&transport, 0x04, 4), 1);
    set(&mut transport, register::DEVICE_FEATURE_SELECT, 2);
    assert_eq!(get(&transport, 0x04, 4), 0);
    assert_eq!(get(&transport, 0x12, 2), 4);
    set16(&mut transport, register::QUEUE_SELECT, 3);
    assert_eq!(get(&transport, register::QUEUE_SIZE, 2), u64::from(QUEUE_SIZE));
    assert_eq!(get(&transport, 0x1e, 2), 3);
    set16(&mut transport, register::QUEUE_SELECT, 4);
    assert_eq!(get(&transport, register::QUEUE_SIZE, 2), 0);
}

#[test]
fn driver_ok_activates_once_with_what_was_programmed() {
    let (mut transport, activation) = started();
    let queue = |index, base| QueueSetup {
        index,
        size: 128,
        descriptor_table: base,
        avail_ring: base + 0x1000,
        used_ring: base + 0x2000,
    };
    assert_eq!(
        activation,
        Activation {
            features: VERSION_1 | FLUSH,
            queues: vec![queue(0, 0x10_0000), queue(2, 0x1_0000_0000)],
        }
    );
    assert_eq!(set_status(&mut transport, SET_UP | DRIVER_OK), None);
    assert_eq!(transport.activated(true), None);
    assert_eq!(set_status(&mut transport, SET_UP | DRIVER_OK), None);
    assert_eq!(status(&transport), SET_UP | DRIVER_OK);
}

#[test]
fn features_are_refused_unless_offered_and_modern() {
    for features in [
        0,
        FLUSH,
        VERSION_1 | 1,
        VERSION_1 | 1 << 63,
        VERSION_1 | 1 << VIRTIO_F_RING_PACKED,
    ] {
        let mut transport = transport();
        negotiate(&mut transport, features);
        assert_eq!(status(&transport), ACKNOWLEDGE | DRIVER, "{features:#x}");
        assert_eq!(
            set_status(&mut transport, SET_UP | DRIVER_OK),
            None,
            "nothing starts without features"
        );
    }
    let mut transport = transport();
    set(&mut transport, register::DRIVER_FEATURE_SELECT, 2);
    set(&mut transport, register::DRIVER_FEATURE, 1);
    negotiate(&mut transport, VERSION_1);
    assert_eq!(status(&transport), ACKNOWLEDGE | DRIVER);
}

#[test]
fn status_stays_until_the_device_has_let_go() {
    let (mut transport, _) = started();
    assert_eq!(transport.activated(true), None);
    assert_eq!(set_status(&mut transport, 0), Some(Effect::RequestReset));
    assert_ne!(status(&transport), 0);
    // Nothing else happens in between.
    assert_eq!(set_status(&mut transport, 0), None);
    assert_eq!(set_status(&mut transport, SET_UP | DRIVER_OK), None);
    assert_eq!(transport.broken(), None);
    assert_eq!(transport.reset_done(), Some(Effect::Reset));
    assert_eq!(status(&transport), 0);
    assert_eq!(get(&transport, register::QUEUE_ENABLE, 2), 0);
    assert_eq!(transport.reset_done(), None);
}

#[test]
fn a_reset_during_activation_waits_for_the_device_too() {
    let (mut transport, _) = started();
    assert_eq!(set_status(&mut transport, 0), Some(Effect::RequestReset));
    assert_eq!(transport.activated(true), None);
    assert_ne!(status(&transport), 0);
    assert_eq!(transport.reset_done(), Some(Effect::Reset));
    assert_eq!(status(&transport), 0);
}

#[test]
fn an_idle_device_resets_at_once() {
    let mut transport = transport();
    negotiate(&mut transport, VERSION_1);
    assert_eq!(set_status(&mut transport, 0), Some(Effect::Reset));
    assert_eq!(status(&transport), 0);
    set(&mut transport, register::DRIVER_FEATURE_SELECT, 1);
    assert_eq!(get(&transport, register::DRIVER_FEATURE, 4), 0);
}

#[test]
fn a_refused_activation_needs_a_reset_which_is_immediate() {
    let (mut transport, _) = started();
    assert_eq!(transport.activated(false), Some(Effect::NeedsReset));
    assert_eq!(status(&transport), SET_UP | DRIVER_OK | NEEDS_RESET);
    assert_eq!(set_status(&mut transport, 0), Some(Effect::Reset));
    assert_eq!(status(&transport), 0);
}

#[test]
fn a_broken_device_is_reset_like_an_active_one() {
    let (mut transport, _) = started();
    assert_eq!(transport.activated(true), None);
    assert_eq!(transport.broken(), Some(Effect::NeedsReset));
    assert_eq!(transport.broken(), None, "the driver is told once");
    assert_eq!(set_status(&mut transport, 0), Some(Effect::RequestReset));
}

#[test]
fn unsound_rings_never_reach_the_device() {
    for (offset, value) in [
        (register::QUEUE_DESC, 0x10_0008),
        (register::QUEUE_DRIVER, 0x10_1001),
        (register::QUEUE_DEVICE, 0x10_2002),
    ] {
        let mut transport = transport();
        negotiate(&mut transport, VERSION_1);
        set(&mut transport, offset, value);
        set16(&mut transport, register::QUEUE_ENABLE, 1);
        assert_eq!(set_status(&mut transport, SET_UP | DRIVER_OK), Some(Effect::NeedsReset));
        assert_ne!(status(&transport) & NEEDS_RESET, 0);
    }
    let mut wrapping = transport();
    negotiate(&mut wrapping, VERSION_1);
    set(&mut wrapping, register::QUEUE_DESC, 0xffff_fff0);
    set(&mut wrapping, register::QUEUE_DESC + 4, 0xffff_ffff);
    set16(&mut wrapping, register::QUEUE_ENABLE, 1);
    assert_eq!(set_status(&mut wrapping, SET_UP | DRIVER_OK), Some(Effect::NeedsReset));
}

#[test]
fn queue_sizes_are_powers_of_two_up_to_the_maximum() {
    let mut transport = transport();
    for (written, read) in [(128, 128), (0, 128), (3, 128), (512, 128), (256, 256), (1, 1)] {
        set16(&mut transport, register::QUEUE_SIZE, written);
        assert_eq!(get(&transport, register::QUEUE_SIZE, 2), read, "{written}");
    }
}

#[test]
fn an_enabled_queue_is_frozen() {
    let mut transport = transport();
    set_queue(&mut transport, 0, 0x10_0000);
    set16(&mut transport, register::QUEUE_SIZE, 16);
    set(&mut transport, register::QUEUE_DESC, 0xdead_0000);
    set16(&mut transport, register::QUEUE_ENABLE, 0);
    assert_eq!(get(&transport, register::QUEUE_SIZE, 2), 128);
    assert_eq!(get(&transport, register::QUEUE_DESC, 8), 0x10_0000);
    assert_eq!(get(&transport, register::QUEUE_ENABLE, 2), 1);
}

#[test]
fn no_queue_is_enabled_behind_the_devices_back() {
    let (mut transport, _) = started();
    set_queue(&mut transport, 1, 0x30_0000);
    assert_eq!(get(&transport, register::QUEUE_ENABLE, 2), 0);
}

#[test]
fn vectors_outside_the_table_read_back_as_none() {
    let mut transport = transport();
    assert_eq!(
        set16(&mut transport, register::CONFIG_VECTOR, 4),
        Some(Effect::ConfigVector)
    );
    assert_eq!(get(&transport, register::CONFIG_VECTOR, 2), 4);
    set16(&mut transport, register::QUEUE_SELECT, 2);
    assert_eq!(
        set16(&mut transport, register::QUEUE_VECTOR, 5),
        Some(Effect::QueueVector(2))
    );
    assert_eq!(get(&transport, register::QUEUE_VECTOR, 2), u64::from(NO_VECTOR));
}

#[test]
fn ring_addresses_can_be_written_whole() {
    let mut transport = transport();
    assert_eq!(transport.write(0x28, &0x1_2345_6780_u64.to_le_bytes()), None);
    assert_eq!(get(&transport, 0x28, 8), 0x1_2345_6780);
    assert_eq!(transport.write(0x24, &u64::MAX.to_le_bytes()), None);
    assert_eq!(get(&transport, 0x28, 8), 0x1_2345_6780);
}
