//! How many descriptors each process of a machine has, and how much memory, counted when nothing comes or goes.

use crate::machine::{Machine, wait_until};
use crate::procfs;
use std::time::Duration;

/// So often in a row nothing may have changed, [`PAUSE`] apart.
const QUIET_ROUNDS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(50);

/// Name, pid and count of every process, when nothing comes or goes any more. One client is connected, so that there are
/// two monitor processes: its own and a spare, both sealed and with the listener of their filter handed over.
pub fn descriptor_counts(machine: &Machine) -> Vec<(String, i32, usize)> {
    let mut last = None;
    let mut quiet = 0;
    wait_until("two monitor processes are sealed and nothing changes", || {
        std::thread::sleep(PAUSE);
        let now = snapshot(machine);
        quiet = if now.is_some() && now == last { quiet + 1 } else { 0 };
        last = now;
        quiet >= QUIET_ROUNDS
    });
    last.expect("waited for it")
}

fn snapshot(machine: &Machine) -> Option<Vec<(String, i32, usize)>> {
    let sealed = |pid: i32| {
        let statuses = procfs::statuses(pid);
        let filters = |status: &String| procfs::field(status, "Seccomp_filters") == "4";
        let has_listener = procfs::descriptors(pid)
            .iter()
            .any(|(_, link)| link.contains("seccomp"));
        !statuses.is_empty() && statuses.iter().all(filters) && !has_listener
    };
    let helpers = machine.helpers();
    let monitors = helpers.iter().filter(|(name, _)| name == "qmp-proc").count();
    if monitors != 2 || !helpers.iter().all(|(_, pid)| sealed(*pid)) {
        return None;
    }
    let own = [
        ("bulkhead".to_owned(), machine.pid()),
        ("launcher".to_owned(), machine.launcher()),
    ];
    let own = own
        .into_iter()
        .chain(machine.opener().map(|pid| ("opener".to_owned(), pid)));
    let count = |(name, pid): (String, i32)| (name, pid, procfs::descriptors(pid).len());
    Some(own.chain(helpers).map(count).collect())
}

/// What one process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// Its name.
    pub name: String,
    /// Its process id.
    pub pid: i32,
    /// Open descriptors.
    pub descriptors: usize,
    /// Resident memory but that of the guest, KiB.
    pub rss_kib: u64,
}

/// What every process holds, in the order of their names; with one client connected, as [`descriptor_counts`].
pub fn holdings(machine: &Machine) -> Vec<Holding> {
    let mut holdings: Vec<_> = descriptor_counts(machine)
        .into_iter()
        .filter_map(|(name, pid, descriptors)| {
            Some(Holding {
                // One that has ended meanwhile holds nothing.
                rss_kib: rss_kib(pid)?,
                name,
                pid,
                descriptors,
            })
        })
        .collect();
    holdings.sort_by(|a, b| (&a.name, a.pid).cmp(&(&b.name, b.pid)));
    holdings
}

fn rss_kib(pid: i32) -> Option<u64> {
    let statuses = procfs::statuses(pid);
    let status = statuses.first()?;
    let kib = |name: &str| -> Option<u64> {
        let value = procfs::field(status, name).split_whitespace().next()?;
        value.parse().ok()
    };
    Some(kib("RssAnon")? + kib("RssFile")?)
}

/// Prints both and compares them: as many processes of each name, as many descriptors in each, and at most
/// `growth_kib` more memory in each that is still the same process.
///
/// # Panics
/// When something is left behind.
pub fn assert_nothing_left(before: &[Holding], after: &[Holding], growth_kib: u64) {
    println!("| process | descriptors before | after | RSS before (KiB) | after |");
    println!("|---|---|---|---|---|");
    for (before, after) in before.iter().zip(after) {
        println!(
            "| {} | {} | {} | {} | {} |",
            before.name, before.descriptors, after.descriptors, before.rss_kib, after.rss_kib
        );
    }
    let counts = |holdings: &[Holding]| -> Vec<(String, usize)> {
        let one = |holding: &Holding| (holding.name.clone(), holding.descriptors);
        let mut counts: Vec<_> = holdings.iter().map(one).collect();
        counts.sort();
        counts
    };
    assert_eq!(counts(before), counts(after));
    for before in before {
        if let Some(after) = after.iter().find(|after| after.pid == before.pid) {
            assert!(
                after.rss_kib <= before.rss_kib + growth_kib,
                "{} (pid {}) has grown from {} to {} KiB",
                before.name,
                before.pid,
                before.rss_kib,
                after.rss_kib
            );
        }
    }
}
