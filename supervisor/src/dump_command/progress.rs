//! What is shown while a dump is written: a bar that moves on a terminal, a line now and then elsewhere.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Characters of the bar.
const BAR: usize = 30;
/// How often there is a line when there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// The rate is that of about this time.
const WINDOW: Duration = Duration::from_secs(3);

/// How it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// One line that changes.
    Bar,
    /// Lines.
    Lines,
}

impl Shown {
    /// What standard error is for.
    pub fn on_standard_error() -> Self {
        if std::io::stderr().is_terminal() {
            Self::Bar
        } else {
            Self::Lines
        }
    }
}

/// How far a dump has come.
pub struct Progress {
    shown: Shown,
    begun: Instant,
    /// When the last line was written.
    last: Option<Instant>,
    /// Since when, and from how many bytes on, the rate is counted.
    window: (Instant, u64),
    rate: f64,
}

impl Progress {
    /// It begins now.
    pub fn begin(shown: Shown) -> Self {
        let now = Instant::now();
        Self {
            shown,
            begun: now,
            last: None,
            window: (now, 0),
            rate: 0.0,
        }
    }

    /// So many bytes of guest memory are done, of how many.
    pub fn show(&mut self, completed: u64, total: u64) {
        let now = Instant::now();
        self.count(now, completed);
        match self.shown {
            Shown::Bar => eprint!("\r{}\x1b[K", line(completed, total, self.rate, true)),
            Shown::Lines => {
                if self.last.is_some_and(|last| now - last < LINE_INTERVAL) {
                    return;
                }
                eprintln!("{}", line(completed, total, self.rate, false));
            }
        }
        let _ = std::io::stderr().flush();
        self.last = Some(now);
    }

    fn count(&mut self, now: Instant, completed: u64) {
        let (since, from) = self.window;
        let seconds = (now - since).as_secs_f64();
        if seconds > 0.0 && completed > from {
            self.rate = (completed - from) as f64 / seconds;
        }
        if now - since > WINDOW {
            // Half of it is forgotten, so that the rate follows without jumping.
            let ago = Duration::from_secs_f64(seconds / 2.0);
            self.window = (now - ago, completed - ((completed - from.min(completed)) / 2));
        }
    }

    /// The dump has ended; how long it took.
    pub fn end(&mut self) -> Duration {
        if self.shown == Shown::Bar && self.last.is_some() {
            eprint!("\r\x1b[K");
            let _ = std::io::stderr().flush();
        }
        self.begun.elapsed()
    }
}

fn line(completed: u64, total: u64, rate: f64, with_bar: bool) -> String {
    let share = if total == 0 {
        0.0
    } else {
        completed.min(total) as f64 / total as f64
    };
    let mut text = String::new();
    if with_bar {
        let full = (share * BAR as f64) as usize;
        let _ = write!(text, "[{:BAR$}] ", "#".repeat(full));
    }
    // Not 100 before the end.
    let _ = write!(
        text,
        "{:3.0} %  {} of {}",
        (share * 100.0).floor(),
        size(completed),
        size(total)
    );
    if rate > 0.0 {
        let left = total.saturating_sub(completed) as f64 / rate;
        let _ = write!(text, "  {}/s  {} left", size(rate as u64), time(left.ceil() as u64));
    }
    text
}

/// What is said at the end. `bytes`: what the file takes up, if there is one.
pub fn summary(name: &str, bytes: Option<u64>, memory_bytes: u64, took: Duration) -> String {
    let seconds = took.as_secs_f64().max(0.001);
    let rate = size((memory_bytes as f64 / seconds) as u64);
    let bytes = bytes.map(|bytes| format!("{} for ", size(bytes))).unwrap_or_default();
    format!(
        "{name}: {bytes}{} of memory, in {seconds:.1} s ({rate}/s)",
        size(memory_bytes)
    )
}

fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 100.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

fn time(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_how_far_how_fast_and_how_long_still() {
        const GIB: u64 = 1 << 30;
        assert_eq!(line(0, 0, 0.0, false), "  0 %  0 bytes of 0 bytes");
        assert_eq!(
            line(GIB, 4 * GIB, (GIB / 2) as f64, false),
            " 25 %  1.0 GiB of 4.0 GiB  512 MiB/s  6 s left"
        );
        let bar = line(2 * GIB, 4 * GIB, 1.0, true);
        assert!(bar.starts_with("[###############               ]  50 %"), "{bar}");
        assert!(line(4 * GIB - 1, 4 * GIB, 0.0, false).starts_with(" 99 %"));
    }

    #[test]
    fn sizes_and_times_are_for_people() {
        assert_eq!(
            [size(1023), size(1024), size(150 << 20)],
            ["1023 bytes", "1.0 KiB", "150 MiB"]
        );
        assert_eq!([time(59), time(61), time(7260)], ["59 s", "1 min 01 s", "2 h 01 min"]);
        let text = summary("d", Some(5 << 20), 1 << 30, Duration::from_millis(500));
        assert_eq!(text, "d: 5.0 MiB for 1.0 GiB of memory, in 0.5 s (2.0 GiB/s)");
    }

    #[test]
    fn the_rate_follows() {
        let mut progress = Progress::begin(Shown::Lines);
        let begun = progress.begun;
        for second in 1..20 {
            progress.count(begun + Duration::from_secs(second), second * 100);
        }
        assert!((progress.rate - 100.0).abs() < 1.0, "{}", progress.rate);
        for second in 20..60 {
            progress.count(begun + Duration::from_secs(second), 2000 + (second - 20) * 1000);
        }
        assert!((progress.rate - 1000.0).abs() < 50.0, "{}", progress.rate);
    }
}
