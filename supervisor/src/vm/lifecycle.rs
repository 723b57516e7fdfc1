//! The machine's run state and every sequence that changes it. One change at a time passes the turnstile.

use super::block_proc::Stage;
use super::io_errors::{self, IoError};
use super::loss::{self, Why};
use super::{Outcome, Vm, bitmaps, dump, exports, image_header, jobs, nbd_client, passwords};
use crate::config::{AutomaticDump, Model};
use crate::helper::{Block, DEADLINE, Helper, HelperError, Protocol, STORAGE_DEADLINE};
use crate::logging;
use ipc::action::{Actions, PanicAction, RebootAction, ShutdownAction};
use ipc::block::{BlockEvent, BlockReply, BlockRequest};
use ipc::qmp::{self, Event, QmpError, RunState, ShutdownCause};
use ipc::vcpu::{VcpuEvent, VcpuRequest};
use ipc::virtio::{Activation, DeviceIndex, MAX_QUEUES};
use ipc::{Failure, Role};
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// The run state.
pub struct Run {
    state: Cell<RunState>,
    /// block-proc takes no requests.
    disks_paused: Cell<bool>,
    /// Counts machine resets: what a device reported before the last one is void.
    epoch: Cell<u64>,
    clock: Clock,
}

/// The guest's clock: how long the machine has been running in all.
#[derive(Default)]
struct Clock {
    before: Cell<Duration>,
    since: Cell<Option<Instant>>,
}

impl Clock {
    fn now(&self) -> Duration {
        self.before.get() + self.since.get().map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn set_running(&self, running: bool) {
        if running == self.since.get().is_some() {
            return;
        }
        self.before.set(self.now());
        self.since.set(running.then(Instant::now));
    }
}

impl Default for Run {
    fn default() -> Self {
        Self {
            state: Cell::new(RunState::Prelaunch),
            disks_paused: Cell::new(false),
            epoch: Cell::new(0),
            clock: Clock::default(),
        }
    }
}

impl Run {
    /// The state now.
    pub fn state(&self) -> RunState {
        self.state.get()
    }

    /// Sets the state.
    pub fn set(&self, state: RunState) {
        self.clock.set_running(state == RunState::Running);
        self.state.set(state);
    }

    /// How long the machine has been running in all.
    pub fn clock(&self) -> Duration {
        self.clock.now()
    }
}

/// Why `cont` and others are refused while a dump is under way.
pub const DUMP_IN_PROGRESS: &str = "There is a dump in process, please wait.";

/// Stops the vCPUs, then the disks, and sets the state. Tells the clients.
pub async fn halt(vm: &Vm, state: RunState) -> Result<(), HelperError> {
    rest(vm, state).await?;
    vm.emit(Event::Stop);
    Ok(())
}

/// The same of a machine that its clients know to be stopped, whatever still moves.
pub async fn rest(vm: &Vm, state: RunState) -> Result<(), HelperError> {
    vm.ask_vcpus(VcpuRequest::Pause).await?;
    pause_disks(vm).await?;
    vm.run.set(state);
    Ok(())
}

/// Waits for the requests in flight and has what the guest wrote flushed to its files. A flush that fails is logged: the
/// disks are paused all the same.
async fn pause_disks(vm: &Vm) -> Result<(), HelperError> {
    let stage = vm.block.stage();
    if vm.run.disks_paused.get() || matches!(stage, Stage::Absent | Stage::GivenUp) {
        return Ok(());
    }
    if let (Some(block), Stage::Starting | Stage::Serving) = (vm.block.get(), stage) {
        match block.ask_within(STORAGE_DEADLINE, BlockRequest::Pause).await {
            Err(HelperError::Failed(failure)) => {
                let message = logging::printable(failure.message.as_bytes());
                logging::line(format_args!(
                    "what the guest wrote may not be on its disks yet: {message}"
                ));
            }
            Err(HelperError::Gone(_)) if vm.block.stage() != Stage::Starting => {}
            other => drop(other?),
        }
    }
    // The next one comes up paused, and until then nothing is written as soon as nothing of the last one is left.
    vm.run.disks_paused.set(true);
    vm.block.fences_down().await;
    Ok(())
}

/// Whether block-proc is to take no requests.
pub fn disks_are_paused(vm: &Vm) -> bool {
    vm.run.disks_paused.get()
}

/// Has the disks of a running machine take no requests for a while, though its vCPUs run on. Whoever asks has the machine's
/// turn. Returns whether [`release_disks`] has to follow.
pub async fn hold_disks(vm: &Vm) -> Result<bool, HelperError> {
    let held = !matches!(vm.block.stage(), Stage::Absent | Stage::GivenUp) && !vm.run.disks_paused.get();
    pause_disks(vm).await?;
    Ok(held)
}

/// Lets them go on.
pub async fn release_disks(vm: &Vm) -> Result<(), HelperError> {
    if !vm.run.disks_paused.replace(false) || vm.block.stage() != Stage::Serving {
        // One that takes its place goes on by itself.
        return Ok(());
    }
    let Some(block) = vm.block.get() else { return Ok(()) };
    match block.ask(BlockRequest::Resume).await {
        Err(HelperError::Gone(_)) => Ok(()),
        other => other.map(drop),
    }
}

/// Lets the disks, then the vCPUs run. Tells the clients.
pub async fn go(vm: &Vm) -> Result<(), HelperError> {
    if vm.remains.is_lost() {
        return Err(HelperError::Gone(Role::Vcpu));
    }
    release_disks(vm).await?;
    vm.run.set(RunState::Running);
    vm.emit(Event::Resume);
    vm.ask_vcpus(VcpuRequest::Run).await?;
    Ok(())
}

/// QMP `stop`.
pub async fn stop(vm: &Vm) -> Result<(), QmpError> {
    if vm.dump.holds_machine() {
        return Err(QmpError::generic(DUMP_IN_PROGRESS));
    }
    let _turn = vm.change.enter().await;
    if vm.state() == RunState::Running {
        halt(vm, RunState::Paused)
            .await
            .map_err(|error| QmpError::generic(error.to_string()))?;
    }
    Ok(())
}

/// QMP `cont`.
pub async fn cont(vm: &Vm) -> Result<(), QmpError> {
    if vm.dump.holds_machine() {
        return Err(QmpError::generic(DUMP_IN_PROGRESS));
    }
    let _turn = vm.change.enter().await;
    loss::check_can_run(vm)?;
    match vm.state() {
        RunState::Running => Ok(()),
        RunState::InternalError | RunState::Shutdown => {
            Err(QmpError::generic("Resetting the Virtual Machine is required"))
        }
        _ => {
            passwords::check(vm)?;
            vm.io_errors.reset_status();
            go(vm).await.map_err(|error| QmpError::generic(error.to_string()))
        }
    }
}

/// Resets the machine: devices, vCPUs, and the kernel loaded again. It runs on if it ran before.
pub async fn reset(vm: Rc<Vm>, guest: bool, reason: ShutdownCause) {
    let _turn = vm.change.enter().await;
    if vm.outcome.get().is_none()
        && loss::check_can_run(&vm).is_ok()
        && let Err(error) = reset_devices_and_boot(&vm, guest, reason).await
    {
        vm.fail_unless_lost(format_args!("the machine could not be reset: {error}"));
    }
}

async fn reset_devices_and_boot(vm: &Vm, guest: bool, reason: ShutdownCause) -> Result<(), String> {
    let text = |error: HelperError| error.to_string();
    let was_running = vm.state() == RunState::Running;
    vm.ask_vcpus(VcpuRequest::Pause).await.map_err(text)?;
    vm.run.epoch.set(vm.run.epoch.get() + 1);
    // All devices, whether block-proc serves them or is just being told to: it works in the order it is asked.
    for device in vm.devices() {
        if let Some(Err(failure)) = take_away(vm, device).await {
            return Err(failure.to_string());
        }
    }
    vm.boot().await?;
    vm.emit(Event::Reset { guest, reason });
    if was_running {
        vm.ask_vcpus(VcpuRequest::Run).await.map_err(text)?;
    } else {
        vm.run.set(RunState::Prelaunch);
    }
    Ok(())
}

/// The guest has powered itself off (or a reset counts as that), or panicked for good.
pub async fn shut_down(vm: Rc<Vm>, reason: ShutdownCause) {
    // A live dump that is under way would end with the machine.
    let _dumps = match vm.actions.get().shutdown {
        ShutdownAction::Poweroff => Some(vm.dump.enter().await),
        ShutdownAction::Pause => None,
    };
    let _turn = vm.change.enter().await;
    if vm.outcome.get().is_some() {
        return;
    }
    vm.emit(Event::Shutdown { guest: true, reason });
    let actions = vm.actions.get();
    if actions.shutdown == ShutdownAction::Poweroff {
        let is_failure = reason == ShutdownCause::GuestPanic && actions.panic == PanicAction::ExitFailure;
        return settle(&vm, if is_failure { Outcome::Failed } else { Outcome::Ended }).await;
    }
    if let Err(error) = halt(&vm, RunState::Shutdown).await {
        vm.fail_unless_lost(error);
    }
}

/// Ends the machine because an operator or a signal wants it. A dump that is under way fails: its output may be a pipe that
/// nobody reads.
pub async fn wind_down(vm: Rc<Vm>) {
    vm.cancel_dump();
    jobs::give_up_all(&vm).await;
    // A live dump does not have the machine's turn: its clients are told first.
    let _dumps = vm.dump.enter().await;
    let _turn = vm.change.enter().await;
    if vm.outcome.get().is_none() {
        settle(&vm, Outcome::Ended).await;
    }
}

/// Ends the machine when what the guest has written, to its disks and on its serial line, has arrived.
async fn settle(vm: &Vm, outcome: Outcome) {
    let settled = match vm.ask_vcpus(VcpuRequest::Pause).await {
        Ok(()) => pause_disks(vm).await,
        Err(error) => Err(error),
    };
    bitmaps::store(vm).await;
    match settled {
        Ok(()) if outcome == Outcome::Failed => vm.fail("the guest has panicked (panic=exit-failure)"),
        Ok(()) => vm.finish(),
        Err(error) => vm.fail(format_args!("at the end of the machine: {error}")),
    }
}

/// What a panic leads to.
fn after_panic(actions: Actions) -> qmp::PanicAction {
    match actions.panic {
        PanicAction::None => qmp::PanicAction::Run,
        PanicAction::Shutdown if actions.shutdown == ShutdownAction::Pause => qmp::PanicAction::Pause,
        PanicAction::Pause => qmp::PanicAction::Pause,
        PanicAction::Shutdown | PanicAction::ExitFailure => qmp::PanicAction::Poweroff,
    }
}

/// The guest's kernel has panicked; its vCPUs have stopped.
async fn panicked(vm: Rc<Vm>) {
    let action = after_panic(vm.actions.get());
    {
        // Of this guest when it still ran there may be a live dump, which goes on.
        let _dumps = match vm.config.dump_on_panic {
            Some(_) => Some(vm.dump.enter().await),
            None => None,
        };
        let _turn = vm.change.enter().await;
        vm.emit(Event::GuestPanicked { action });
        let done = match (action, &vm.config.dump_on_panic) {
            (_, Some(wanted)) => stop_and_dump(&vm, wanted, action).await,
            (qmp::PanicAction::Run, None) => go_on(&vm).await,
            (qmp::PanicAction::Pause | qmp::PanicAction::Poweroff, None) => halt(&vm, RunState::GuestPanicked).await,
        };
        if let Err(error) = done {
            return vm.fail_unless_lost(error);
        }
        if vm.dump_is_cancelled() {
            return;
        }
    }
    if action == qmp::PanicAction::Poweroff {
        shut_down(vm, ShutdownCause::GuestPanic).await;
    }
}

/// Stops the machine of a guest that has panicked, dumps its memory, and lets it go on where it shall.
async fn stop_and_dump(vm: &Vm, wanted: &AutomaticDump, action: qmp::PanicAction) -> Result<(), HelperError> {
    let was_running = vm.state() == RunState::Running;
    halt(vm, RunState::GuestPanicked).await?;
    dump::by_itself(vm, wanted, "the guest has panicked").await;
    if action == qmp::PanicAction::Run && was_running && vm.outcome.get().is_none() && !vm.dump_is_cancelled() {
        go(vm).await?;
    }
    Ok(())
}

/// Lets vCPUs that have stopped by themselves run again, unless the machine has been stopped meanwhile.
async fn go_on(vm: &Vm) -> Result<(), HelperError> {
    if vm.state() == RunState::Running {
        vm.ask_vcpus(VcpuRequest::Run).await?;
    }
    Ok(())
}

impl Vm {
    /// Does what a helper has asked for without being asked.
    pub(super) fn follow<P: Protocol>(&self, helper: &Helper<P>, sequence: impl Future<Output = ()> + 'static) {
        let Some(under_way) = helper.begin() else { return };
        self.executor.spawn(async move {
            sequence.await;
            drop(under_way);
        });
    }

    pub(super) fn vcpu_event(self: &Rc<Self>, event: VcpuEvent) {
        let Some(vcpu) = self.vcpu.get() else { return };
        let vm = Rc::clone(self);
        match event {
            VcpuEvent::ActivateDevice { activation, .. } if activation.queues.len() > usize::from(MAX_QUEUES) => {
                vcpu.kill("a device with too many queues");
            }
            VcpuEvent::ActivateDevice { device, activation } => self.follow(vcpu, activate(vm, device, activation)),
            VcpuEvent::ResetDevice { device } => self.follow(vcpu, reset_device(vm, device)),
            VcpuEvent::GuestReset if self.actions.get().reboot == RebootAction::Shutdown => {
                self.follow(vcpu, shut_down(vm, ShutdownCause::GuestReset));
            }
            VcpuEvent::GuestReset => self.follow(vcpu, reset(vm, true, ShutdownCause::GuestReset)),
            VcpuEvent::GuestShutdown => self.follow(vcpu, shut_down(vm, ShutdownCause::GuestShutdown)),
            VcpuEvent::GuestPanicked { crash_loaded: true } => {
                self.emit(Event::GuestCrashloaded {
                    action: qmp::PanicAction::Run,
                });
            }
            VcpuEvent::GuestPanicked { crash_loaded: false } => self.follow(vcpu, panicked(vm)),
            VcpuEvent::VcpuFailed { vcpu: number, detail } => {
                vcpu.remark(format_args!("vCPU {number} cannot go on: {}", logging::brief(&detail)));
                self.follow(vcpu, loss::stop(vm, Why::VcpuFailed));
            }
            VcpuEvent::SerialClosed => self.serial.closed(),
            VcpuEvent::RtcChanged => self.rtc.changed(Instant::now()),
        }
    }

    pub(super) fn block_event(self: &Rc<Self>, block: &Helper<Block>, event: BlockEvent) {
        match event {
            BlockEvent::DeviceBroken { device, detail } => {
                let name = self.device_name(device);
                block.remark(format_args!(
                    "{name}: the driver's rings are broken: {}",
                    logging::brief(&detail)
                ));
                let vm = Rc::clone(self);
                self.follow(block, async move {
                    if let Ok(vcpu) = vm.vcpu() {
                        let _ = vcpu.ask(VcpuRequest::DeviceBroken { device }).await;
                    }
                });
            }
            BlockEvent::NbdClientGone(client) => exports::gone(self, client),
            BlockEvent::NbdLost { node } => nbd_client::lost(self, node),
            BlockEvent::Job { job, progress, what } => jobs::told(self, block, job, progress, what),
            BlockEvent::RngDry { device, errno } => {
                let name = self.device_name(device);
                let why = match errno {
                    0 => "it is at its end",
                    errno => nix::errno::Errno::from_raw(errno).desc(),
                };
                block.remark(format_args!(
                    "{name}: the source of random bytes has none: {why}; it is asked again every second"
                ));
            }
            BlockEvent::WriteThreshold {
                node,
                excess_bytes,
                threshold_bytes,
            } => image_header::threshold_exceeded(self, node, excess_bytes, threshold_bytes),
            BlockEvent::IoError {
                device,
                node,
                kind,
                action,
                errno,
            } => io_errors::failed(
                self,
                block,
                &IoError {
                    device,
                    node,
                    kind,
                    action,
                    errno: nix::errno::Errno::from_raw(errno),
                },
            ),
        }
    }

    /// The machine's virtio devices.
    pub(super) fn devices(&self) -> impl Iterator<Item = DeviceIndex> + use<> {
        (0..self.config.devices.len() as u8).map(DeviceIndex)
    }

    /// What the log calls a device: by its id, or by its drive's.
    pub(super) fn device_name(&self, device: DeviceIndex) -> String {
        let config = self.config.devices.get(usize::from(device.0));
        let id = config.and_then(|config| config.id.clone());
        let drive = || match &config?.model {
            Model::Block(block) => Some(block.drive.clone()),
            Model::Rng(_) => None,
        };
        id.or_else(drive).unwrap_or_else(|| format!("device {}", device.0))
    }
}

/// Passes what a driver programmed from vcpu-proc to block-proc, and the answer back.
async fn activate(vm: Rc<Vm>, device: DeviceIndex, activation: Activation) {
    let epoch = vm.run.epoch.get();
    let Ok(vcpu) = vm.vcpu() else { return };
    let number = vm.block.activated(device, activation.clone());
    let request = || {
        // It may have been reset meanwhile.
        let is_wanted = vm.block.is_active(device, number);
        is_wanted.then(|| BlockRequest::Activate {
            device,
            number,
            activation: activation.clone(),
        })
    };
    let Some(result) = vm.block.ask_surely(DEADLINE, request).await else {
        return;
    };
    if vm.run.epoch.get() != epoch {
        return;
    }
    if let Err(failure) = &result {
        vm.block.deactivated(device);
        logging::line(format_args!(
            "{}: its driver's setup is refused: {}",
            vm.device_name(device),
            logging::printable(failure.message.as_bytes())
        ));
    }
    let _ = vcpu
        .ask(VcpuRequest::DeviceActivated {
            device,
            ok: result.is_ok(),
        })
        .await;
}

/// Takes a device away from block-proc, then lets its driver see status 0.
async fn reset_device(vm: Rc<Vm>, device: DeviceIndex) {
    let epoch = vm.run.epoch.get();
    let Ok(vcpu) = vm.vcpu() else { return };
    let done = take_away(&vm, device).await;
    if matches!(done, Some(Err(_))) || vm.run.epoch.get() != epoch {
        return;
    }
    let _ = vcpu.ask(VcpuRequest::DeviceReset { device }).await;
}

/// Has block-proc serve a device no longer; nothing where there is none that could.
async fn take_away(vm: &Vm, device: DeviceIndex) -> Option<Result<BlockReply, Failure>> {
    vm.block.deactivated(device);
    let request = || Some(BlockRequest::Reset { device });
    vm.block.ask_surely(STORAGE_DEADLINE, request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_clock_runs_while_the_machine_does() {
        let run = Run::default();
        let pause = Duration::from_millis(5);
        std::thread::sleep(pause);
        assert_eq!(run.clock(), Duration::ZERO);
        run.set(RunState::Running);
        std::thread::sleep(pause);
        run.set(RunState::Running);
        assert!(run.clock() >= pause, "{:?}", run.clock());
        run.set(RunState::Paused);
        let stopped = run.clock();
        std::thread::sleep(pause);
        assert_eq!(run.clock(), stopped);
        run.set(RunState::Running);
        std::thread::sleep(pause);
        assert!(run.clock() >= stopped + pause);
    }

    #[test]
    fn a_panic_leads_where_both_actions_say() {
        use qmp::PanicAction::{Pause, Poweroff, Run};
        for (panic, shutdown, expected) in [
            (PanicAction::Shutdown, ShutdownAction::Poweroff, Poweroff),
            (PanicAction::Shutdown, ShutdownAction::Pause, Pause),
            (PanicAction::Pause, ShutdownAction::Poweroff, Pause),
            (PanicAction::ExitFailure, ShutdownAction::Poweroff, Poweroff),
            (PanicAction::ExitFailure, ShutdownAction::Pause, Poweroff),
            (PanicAction::None, ShutdownAction::Pause, Run),
        ] {
            let actions = Actions {
                panic,
                shutdown,
                ..Actions::default()
            };
            assert_eq!(after_panic(actions), expected, "{actions:?}");
        }
    }
}
