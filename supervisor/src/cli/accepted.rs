//! Options that QEMU's command lines have and that ask for what Bulkhead does anyway: data alone. Another value is an
//! error that says what is so instead.

use super::keyval::{Keys, only};

/// An option that has a single word for a value.
macro_rules! words {
    ($words:expr, $why:expr) => {
        Keys {
            implied: Some("type"),
            list: None,
            keys: &[only("type", $words, $why)],
        }
    };
}

pub(super) static DISPLAY: Keys = words!(&["none"], "there is no display");
pub(super) static VGA: Keys = words!(&["none"], "there is no graphics card");
pub(super) static MONITOR: Keys = words!(
    &["none", "null"],
    "there is no human monitor (QMP is -qmp unix:PATH,server=on,wait=off)"
);
pub(super) static PARALLEL: Keys = words!(&["none", "null"], "there is no parallel port");
pub(super) static NIC: Keys = words!(&["none"], "there are no network devices");

pub(super) static RTC: Keys = Keys {
    implied: None,
    list: None,
    keys: &[
        only("base", &["utc"], "the machine's clock shows UTC"),
        only("clock", &["host"], "the machine's clock follows the host's"),
        only("driftfix", &["none"], "lost ticks are not made up for"),
    ],
};

pub(super) static BOOT: Keys = Keys {
    implied: None,
    list: None,
    keys: &[
        only(
            "strict",
            &["on"],
            "the machine boots what -kernel names and nothing else",
        ),
        only("menu", &["off"], "there is no boot menu"),
    ],
};

pub(super) static OVERCOMMIT: Keys = Keys {
    implied: None,
    list: None,
    keys: &[
        only("mem-lock", &["off"], "guest memory is not locked"),
        only(
            "cpu-pm",
            &["off"],
            "the guest does not control the host CPU's power states",
        ),
    ],
};

pub(super) static MSG: Keys = Keys {
    implied: None,
    list: None,
    keys: &[
        only("timestamp", &["on", "off"], "the log has its own form"),
        only("guest-name", &["off"], "the log has its own form"),
    ],
};
