//! Numbers about a machine, in Prometheus' text format.
//!
//! What roles use comes from their control groups, whose files stay the same whatever processes come and go; what has become
//! of them from the supervisor.

use super::cgroup::Group;
use crate::counters::{Counters, RoleCounters};
use ipc::Role;
use ipc::qmp::RunState;
use std::fmt::Write as _;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// What a file of a control group tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// `cpu.stat`: microseconds.
    CpuStat,
    /// `cpuacct.usage`: nanoseconds.
    CpuAccountNs,
    /// All memory, bytes.
    Memory,
    /// What of it is mapped.
    MemoryStat,
    /// `io.stat`: one line for each device.
    IoStat,
    /// Version 1's.
    BlkioBytes,
    /// How many processes and threads there are.
    Processes,
}

/// An open file of a control group.
#[derive(Debug)]
pub struct Meter {
    /// Whose.
    pub group: Group,
    /// What.
    pub source: Source,
    /// Open for reading.
    pub file: OwnedFd,
}

/// What the supervisor says of the machine: a packet of fixed size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct News {
    roles: [RoleCounters; Role::ALL.len()],
    state: u8,
}

/// Run states that a machine can be in here, with QMP's names.
const STATES: [(RunState, &str); 8] = [
    (RunState::Prelaunch, "prelaunch"),
    (RunState::Running, "running"),
    (RunState::Paused, "paused"),
    (RunState::Shutdown, "shutdown"),
    (RunState::GuestPanicked, "guest-panicked"),
    (RunState::IoError, "io-error"),
    (RunState::InternalError, "internal-error"),
    (RunState::SaveVm, "save-vm"),
];

/// Size of [`News`] on the channel.
pub const NEWS_BYTES: usize = 1 + 16 * Role::ALL.len();

impl Default for News {
    fn default() -> Self {
        Self::new(&Counters::default(), RunState::Prelaunch)
    }
}

impl News {
    /// As it is now.
    pub fn new(counters: &Counters, state: RunState) -> Self {
        let place = STATES.iter().position(|(known, _)| *known == state);
        Self {
            roles: Role::ALL.map(|role| counters.of(role)),
            state: place.map_or(u8::MAX, |place| place as u8),
        }
    }

    /// For the channel.
    pub fn encode(&self) -> [u8; NEWS_BYTES] {
        let mut packet = [0; NEWS_BYTES];
        packet[0] = self.state;
        for (words, role) in packet[1..].chunks_exact_mut(16).zip(&self.roles) {
            words[..8].copy_from_slice(&role.restarts.to_le_bytes());
            words[8..].copy_from_slice(&role.violations.to_le_bytes());
        }
        packet
    }

    /// From the channel.
    pub fn decode(packet: &[u8; NEWS_BYTES]) -> Self {
        let mut roles = [RoleCounters::default(); Role::ALL.len()];
        for (words, role) in packet[1..].chunks_exact(16).zip(&mut roles) {
            let word = |half: &[u8]| half.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
            role.restarts = word(&words[..8]);
            role.violations = word(&words[8..]);
        }
        Self {
            roles,
            state: packet[0],
        }
    }
}

/// Bytes of a file that are looked at: far more than any of them has for some devices.
const FILE_BYTES: usize = 16 << 10;

/// The whole page.
pub fn page(name: &str, uptime: Duration, news: &News, meters: &[Meter]) -> String {
    let mut page = Page {
        text: String::new(),
        name: escaped(name),
    };
    page.head("uptime_seconds", "gauge", "Time since the machine was started.");
    page.line("uptime_seconds", "", &format!("{:.3}", uptime.as_secs_f64()));
    page.head("run_state", "gauge", "1 for the state that the machine is in.");
    for (place, (_, state)) in STATES.iter().enumerate() {
        let is = u8::from(usize::from(news.state) == place);
        page.line("run_state", &format!("state=\"{state}\""), &is.to_string());
    }
    page.head(
        "restarts_total",
        "counter",
        "Helpers that took the place of one that had ended.",
    );
    for (role, counts) in Role::ALL.iter().zip(&news.roles) {
        page.line("restarts_total", &of(role.name()), &counts.restarts.to_string());
    }
    page.head(
        "violations_total",
        "counter",
        "System calls that a policy does not allow.",
    );
    for (role, counts) in Role::ALL.iter().zip(&news.roles) {
        page.line("violations_total", &of(role.name()), &counts.violations.to_string());
    }
    let values: Vec<(Group, Vec<(&str, f64)>)> = meters
        .iter()
        .map(|meter| (meter.group, values(meter.source, &content(&meter.file))))
        .collect();
    for (metric, kind, help) in METRICS {
        let lines = values.iter().flat_map(|(group, values)| {
            let values = values.iter().filter(move |(name, _)| name == metric);
            values.map(move |(_, value)| (*group, *value))
        });
        let mut has_head = false;
        for (group, value) in lines {
            if !std::mem::replace(&mut has_head, true) {
                page.head(metric, kind, help);
            }
            page.line(metric, &of(group.name()), &value.to_string());
        }
    }
    page.text
}

/// What control groups tell.
const METRICS: &[(&str, &str, &str)] = &[
    ("cpu_seconds_total", "counter", "Time on processors."),
    (
        "memory_bytes",
        "gauge",
        "Memory that is charged to the role, caches included.",
    ),
    (
        "memory_resident_bytes",
        "gauge",
        "Of that, private memory and what is mapped.",
    ),
    ("read_bytes_total", "counter", "Bytes read from block devices."),
    ("written_bytes_total", "counter", "Bytes written to block devices."),
    ("threads", "gauge", "Processes and threads."),
];

struct Page {
    text: String,
    name: String,
}

impl Page {
    fn head(&mut self, metric: &str, kind: &str, help: &str) {
        let _ = writeln!(
            self.text,
            "# HELP bulkhead_{metric} {help}\n# TYPE bulkhead_{metric} {kind}"
        );
    }

    fn line(&mut self, metric: &str, labels: &str, value: &str) {
        let comma = if labels.is_empty() { "" } else { "," };
        let _ = writeln!(
            self.text,
            "bulkhead_{metric}{{vm=\"{}\"{comma}{labels}}} {value}",
            self.name
        );
    }
}

fn of(role: &str) -> String {
    format!("role=\"{role}\"")
}

/// A label's value, as the format wants it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn content(file: &OwnedFd) -> String {
    use std::os::fd::AsFd;
    let mut bytes = vec![0; FILE_BYTES];
    let length = read_at_start(file.as_fd(), &mut bytes);
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

/// The kernel makes such a file's content anew for whoever reads it from its start.
fn read_at_start(file: BorrowedFd<'_>, bytes: &mut [u8]) -> usize {
    // SAFETY: the buffer is as long as it says.
    let length = unsafe { libc::pread(file.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    usize::try_from(length).unwrap_or(0)
}

fn values(source: Source, text: &str) -> Vec<(&'static str, f64)> {
    let whole = || text.trim().parse::<f64>().ok();
    let field = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(' '));
        lines.find_map(|(known, value)| (known == name).then(|| value.trim().parse::<f64>().ok())?)
    };
    let one = |name, value: Option<f64>| value.map(|value| (name, value)).into_iter().collect();
    match source {
        Source::CpuStat => one("cpu_seconds_total", field("usage_usec").map(|us| us / 1e6)),
        Source::CpuAccountNs => one("cpu_seconds_total", whole().map(|ns| ns / 1e9)),
        Source::Memory => one("memory_bytes", whole()),
        Source::Processes => one("threads", whole()),
        Source::MemoryStat => {
            // Version 2 says anon, version 1 rss.
            let private = field("anon").or_else(|| field("rss"));
            let mapped = field("file_mapped").or_else(|| field("mapped_file"));
            one(
                "memory_resident_bytes",
                private.map(|private| private + mapped.unwrap_or(0.0)),
            )
        }
        Source::IoStat => {
            let sum = |key: &str| {
                let words = text.split_whitespace().filter_map(|word| word.split_once('='));
                words
                    .filter(|(known, _)| *known == key)
                    .filter_map(|(_, value)| value.parse::<f64>().ok())
                    .fold(0.0, |sum, value: f64| sum + value)
            };
            vec![
                ("read_bytes_total", sum("rbytes")),
                ("written_bytes_total", sum("wbytes")),
            ]
        }
        Source::BlkioBytes => {
            let sum = |key: &str| {
                let lines = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
                lines
                    .filter(|words| words.get(1) == Some(&key))
                    .filter_map(|words| words.get(2)?.parse::<f64>().ok())
                    .fold(0.0, |sum, value: f64| sum + value)
            };
            vec![("read_bytes_total", sum("Read")), ("written_bytes_total", sum("Write"))]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_arrive_as_they_were_sent() {
        let counters = Counters::default();
        counters.restarted(Role::Block);
        counters.violated(Role::Qmp);
        let news = News::new(&counters, RunState::Running);
        assert_eq!(News::decode(&news.encode()), news);
        let page = page("a\"b", Duration::from_millis(1500), &news, &[]);
        for line in [
            "bulkhead_uptime_seconds{vm=\"a\\\"b\"} 1.500",
            "bulkhead_run_state{vm=\"a\\\"b\",state=\"running\"} 1",
            "bulkhead_run_state{vm=\"a\\\"b\",state=\"paused\"} 0",
            "bulkhead_restarts_total{vm=\"a\\\"b\",role=\"block-proc\"} 1",
            "bulkhead_violations_total{vm=\"a\\\"b\",role=\"qmp-proc\"} 1",
        ] {
            assert!(page.lines().any(|found| found == line), "no {line} in {page}");
        }
    }

    #[test]
    fn files_of_both_versions_are_read() {
        for (source, text, expected) in [
            (
                Source::CpuStat,
                "usage_usec 1500000\nuser_usec 1\n",
                vec![("cpu_seconds_total", 1.5)],
            ),
            (Source::CpuAccountNs, "2500000000\n", vec![("cpu_seconds_total", 2.5)]),
            (Source::Memory, "4096\n", vec![("memory_bytes", 4096.0)]),
            (
                Source::MemoryStat,
                "anon 10\nfile 5\nfile_mapped 4\n",
                vec![("memory_resident_bytes", 14.0)],
            ),
            (
                Source::MemoryStat,
                "cache 3\nrss 10\nmapped_file 1\n",
                vec![("memory_resident_bytes", 11.0)],
            ),
            (
                Source::IoStat,
                "8:0 rbytes=1 wbytes=2 rios=3\n8:16 rbytes=10 wbytes=20\n",
                vec![("read_bytes_total", 11.0), ("written_bytes_total", 22.0)],
            ),
            (
                Source::BlkioBytes,
                "8:0 Read 1\n8:0 Write 2\n8:0 Total 3\nTotal 3\n",
                vec![("read_bytes_total", 1.0), ("written_bytes_total", 2.0)],
            ),
            (Source::Memory, "what\n", vec![]),
        ] {
            assert_eq!(values(source, text), expected, "{text:?}");
        }
    }
}
