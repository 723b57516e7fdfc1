//! What the machine does when its guest reboots, powers itself off or panics: `-action` and set-action, by QMP's names.

use serde::{Deserialize, Serialize};

/// All of them, as they are at start unless the command line says otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actions {
    /// On a reset by the guest.
    pub reboot: RebootAction,
    /// When the guest powers itself off.
    pub shutdown: ShutdownAction,
    /// When the guest's kernel panics.
    pub panic: PanicAction,
    /// When a watchdog expires. The machine has no watchdog that could: the choice is kept and nothing asks for it.
    pub watchdog: WatchdogAction,
    /// When vcpu-proc or block-proc has ended for good. Bulkhead's own.
    pub helper_loss: HelperLossAction,
}

/// QMP's RebootAction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RebootAction {
    /// The machine starts again.
    #[default]
    Reset,
    /// The machine ends as if the guest had powered itself off.
    Shutdown,
}

/// QMP's ShutdownAction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownAction {
    /// The machine ends.
    #[default]
    Poweroff,
    /// The machine stays, stopped.
    Pause,
}

/// QMP's PanicAction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PanicAction {
    /// The machine stays, stopped.
    Pause,
    /// As if the guest had powered itself off; with [`ShutdownAction::Pause`] the same as `Pause`.
    #[default]
    Shutdown,
    /// As if the guest had powered itself off, and the exit status says that it failed.
    ExitFailure,
    /// The guest goes on.
    None,
}

/// What becomes of a machine that has lost a helper that it cannot be without.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HelperLossAction {
    /// The machine stays, stopped, to be dumped and looked into.
    #[default]
    Pause,
    /// The machine ends, and the exit status says that it failed.
    Shutdown,
}

/// QMP's WatchdogAction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub enum WatchdogAction {
    #[default]
    Reset,
    Shutdown,
    Poweroff,
    Pause,
    Debug,
    None,
    InjectNmi,
}
