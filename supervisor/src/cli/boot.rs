//! What the machine boots, and how it runs: options with one plain value.

use super::draft::Draft;
use super::error::UsageError;
use super::given::{Given, checked_path};
use super::keyval::{Keys, Pairs, value};
use crate::config::AutomaticDump;
use crate::vm::dump::FORMATS;
use ipc::action::{Actions, HelperLossAction, PanicAction, RebootAction, ShutdownAction, WatchdogAction};
use ipc::qmp::DumpFormat;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

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
        value("panic"),
        value("watchdog"),
        value("helper-loss"),
    ],
};

/// `-action reboot=shutdown` is `-no-reboot`, `-action shutdown=pause` is `-no-shutdown`.
pub(super) fn action(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    let Actions {
        reboot,
        shutdown,
        panic,
        watchdog,
        helper_loss,
    } = &mut draft.actions;
    choose(
        pairs,
        "helper-loss",
        helper_loss,
        &[
            ("pause", HelperLossAction::Pause),
            ("shutdown", HelperLossAction::Shutdown),
        ],
    )?;
    choose(
        pairs,
        "reboot",
        reboot,
        &[("reset", RebootAction::Reset), ("shutdown", RebootAction::Shutdown)],
    )?;
    choose(
        pairs,
        "shutdown",
        shutdown,
        &[("poweroff", ShutdownAction::Poweroff), ("pause", ShutdownAction::Pause)],
    )?;
    choose(
        pairs,
        "panic",
        panic,
        &[
            ("shutdown", PanicAction::Shutdown),
            ("pause", PanicAction::Pause),
            ("exit-failure", PanicAction::ExitFailure),
            ("none", PanicAction::None),
        ],
    )?;
    choose(
        pairs,
        "watchdog",
        watchdog,
        &[
            ("reset", WatchdogAction::Reset),
            ("shutdown", WatchdogAction::Shutdown),
            ("poweroff", WatchdogAction::Poweroff),
            ("pause", WatchdogAction::Pause),
            ("debug", WatchdogAction::Debug),
            ("none", WatchdogAction::None),
            ("inject-nmi", WatchdogAction::InjectNmi),
        ],
    )
}

/// Sets an action to the one that a key names, if the key is there.
fn choose<T: Copy>(pairs: &Pairs, key: &str, field: &mut T, choices: &[(&str, T)]) -> Result<(), UsageError> {
    if let Some(given) = pairs.get(key) {
        let chosen = choices.iter().find(|(word, _)| given.value == *word);
        let words = || choices.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
        (_, *field) = *chosen.ok_or_else(|| given.refuse(format!("{key} is one of {}", words())))?;
    }
    Ok(())
}

/// `-dump-on-panic` and `-dump-on-crash`.
pub(super) static DUMP_KEYS: Keys = Keys {
    implied: Some("protocol"),
    list: None,
    keys: &[value("protocol"), value("format")],
};

/// Where to and how memory is dumped when the guest panics. The file is made then.
pub(super) fn dump_on_panic(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    draft.dump_on_panic = Some(automatic_dump(pairs)?);
    Ok(())
}

/// The same when the machine stops with an internal error.
pub(super) fn dump_on_crash(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    draft.dump_on_crash = Some(automatic_dump(pairs)?);
    Ok(())
}

fn automatic_dump(pairs: &Pairs) -> Result<AutomaticDump, UsageError> {
    let protocol = pairs.require("protocol", "write file:FILE")?;
    let name = protocol.value.as_bytes().strip_prefix(b"file:");
    let name = name.ok_or_else(|| protocol.refuse("write file:FILE: no client is there that could pass an fd"))?;
    let path = checked_path(OsStr::from_bytes(name)).map_err(|problem| protocol.refuse(problem))?;
    let format = match pairs.get("format") {
        Some(given) => FORMATS
            .iter()
            .find(|format| given.value == format.name())
            .copied()
            .ok_or_else(|| {
                let names: Vec<_> = FORMATS.iter().map(|format| format.name()).collect();
                given.refuse(format!("format is one of {}", names.join(", ")))
            })?,
        // A plain file, which every reader opens.
        None => DumpFormat::KdumpRawZlib,
    };
    Ok(AutomaticDump { path, format })
}
