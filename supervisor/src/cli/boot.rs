//! What the machine boots, and how it runs: options with one plain value.

use super::draft::Draft;
use super::error::UsageError;
use super::given::Given;
use super::keyval::{Keys, Pairs, only, value};

pub(super) fn kernel(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    draft.kernel = Some(given.path()?);
    Ok(())
}

pub(super) fn initrd(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    draft.initrd = Some(given.path()?);
    Ok(())
}

pub(super) fn append(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    draft.command_line = given.text()?.to_owned();
    Ok(())
}

pub(super) fn pidfile(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    draft.pidfile = Some(given.path()?);
    Ok(())
}

/// `-action`.
pub(super) static ACTION_KEYS: Keys = Keys {
    implied: None,
    list: None,
    keys: &[
        value("reboot"),
        value("shutdown"),
        only("watchdog", &["none"], "the machine has no watchdog"),
    ],
};

/// `-action reboot=shutdown` is `-no-reboot`, `-action shutdown=pause` is `-no-shutdown`.
pub(super) fn action(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    for (key, field, off, on) in [
        ("reboot", &mut draft.no_reboot, "reset", "shutdown"),
        ("shutdown", &mut draft.no_shutdown, "poweroff", "pause"),
    ] {
        let Some(given) = pairs.get(key) else { continue };
        *field = if given.value == on {
            true
        } else if given.value == off {
            false
        } else {
            return Err(given.refuse(format!("{key} is {off} or {on}")));
        };
    }
    Ok(())
}
