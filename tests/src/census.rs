//! How many descriptors each process of a machine has, counted when nothing comes or goes.

use crate::machine::{Machine, wait_until};
use crate::procfs;
use std::time::Duration;

/// Name, pid and count of every process. One client is connected: counting begins when the next monitor process is
/// sealed and has handed its filter's listener over.
pub fn descriptor_counts(machine: &Machine) -> Vec<(String, i32, usize)> {
    wait_until("two monitor processes are sealed", || {
        let sealed = |pid: i32| {
            let statuses = procfs::statuses(pid);
            let filters = |status: &String| procfs::field(status, "Seccomp_filters") == "4";
            let has_listener = procfs::descriptors(pid)
                .iter()
                .any(|(_, link)| link.contains("seccomp"));
            statuses.iter().all(filters) && !has_listener
        };
        let helpers = machine.helpers();
        let monitors = helpers.iter().filter(|(name, _)| name == "qmp-proc").count();
        monitors == 2 && helpers.iter().all(|(_, pid)| sealed(*pid))
    });
    let own = [
        ("bulkhead".to_owned(), machine.pid()),
        ("launcher".to_owned(), machine.launcher()),
    ];
    let processes: Vec<_> = own.into_iter().chain(machine.helpers()).collect();
    let count = || -> Vec<_> {
        let one = |(name, pid): &(String, i32)| (name.clone(), *pid, procfs::descriptors(*pid).len());
        processes.iter().map(one).collect()
    };
    let mut counts = count();
    wait_until("the descriptors stay as they are", || {
        std::thread::sleep(Duration::from_millis(50));
        let before = std::mem::replace(&mut counts, count());
        before == counts
    });
    counts
}
