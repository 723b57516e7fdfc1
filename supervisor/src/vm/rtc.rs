//! RTC_CHANGE: the guest has set its real-time clock.
//!
//! Clients get at most one a second, with the latest offset (reference: QEMU's rate limit of this event). vcpu-proc reports
//! a change once and then waits to be asked, so a guest that sets its clock all the time costs a question a second.

use super::Vm;
use ipc::qmp::Event;
use ipc::vcpu::{VcpuReply, VcpuRequest};
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// The clock's name in the object tree, below `/machine`.
pub(super) const NAME: &str = "rtc";
/// At least this long between two events.
const INTERVAL: Duration = Duration::from_secs(1);

/// When the next event is due.
#[derive(Default)]
pub(super) struct RtcChanges {
    due: Cell<Option<Instant>>,
    last: Cell<Option<Instant>>,
}

impl RtcChanges {
    /// The guest has set the clock.
    pub(super) fn changed(&self, now: Instant) {
        let earliest = self.last.get().map_or(now, |last| last + INTERVAL);
        self.due.set(Some(earliest.max(now)));
    }

    /// When to look again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due.get()
    }

    /// Whether an event is due, which then counts as sent.
    pub(super) fn take_due(&self, now: Instant) -> bool {
        let due = self.due.get().is_some_and(|due| due <= now);
        if due {
            self.due.set(None);
            self.last.set(Some(now));
        }
        due
    }
}

/// Asks for the offset and tells the clients.
pub(super) async fn announce(vm: Rc<Vm>) {
    let Ok(vcpu) = vm.vcpu() else { return };
    // A vcpu-proc that is gone ends the machine elsewhere.
    if let Ok(VcpuReply::RtcOffset(offset)) = vcpu.ask(VcpuRequest::GetRtcOffset).await {
        vm.emit(Event::RtcChange {
            offset,
            qom_path: format!("/machine/{NAME}"),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_change_is_told_at_once_and_later_ones_a_second_apart() {
        let changes = RtcChanges::default();
        let start = Instant::now();
        assert!(!changes.take_due(start));
        changes.changed(start);
        assert!(changes.take_due(start));
        let soon = start + Duration::from_millis(10);
        changes.changed(soon);
        assert_eq!(changes.due(), Some(start + INTERVAL));
        assert!(!changes.take_due(soon));
        assert!(changes.take_due(start + INTERVAL));
        let late = start + 5 * INTERVAL;
        changes.changed(late);
        assert_eq!(changes.due(), Some(late), "nothing is owed for a quiet time");
    }
}
