//! A machine that cannot go on, kept for whoever looks into it.
//!
//! When vcpu-proc has ended, guest RAM is still there, and so are the vCPUs' last registers: KVM leaves them in each vCPU's
//! run page whenever KVM_RUN returns, also when a deadly signal returns it, and the page lives as long as somebody has the
//! vCPU's descriptor. The supervisor has had them since before vcpu-proc was sealed. It can do nothing with them (KVM refuses
//! whoever did not make the machine) and does not map them: a dump-proc does, reads, and ends.
//!
//! The run state is `internal-error`. Memory can be dumped and looked into until `quit`; the machine does not run again. The
//! same is so after block-proc has ended too often ([`super::restart`]), where vcpu-proc still has the registers.

use super::block_proc::Stage;
use super::{Vm, dump, lifecycle, looking};
use crate::helper::{Dump, Helper, HelperError, Vcpu};
use crate::logging;
use ipc::Role;
use ipc::action::HelperLossAction;
use ipc::caps::RunPageFd;
use ipc::dump::{DumpReply, DumpRequest};
use ipc::qmp::{Event, QmpError, RunState, ShutdownCause};
use ipc::vcpu::{RUN_PAGES_PER_MESSAGE, VcpuRegisters, VcpuReply, VcpuRequest};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

/// What is kept for the case that vcpu-proc ends, and what is left when it has.
#[derive(Default)]
pub struct Remains {
    run_pages: RefCell<Vec<RunPageFd>>,
    lost: Cell<bool>,
    /// Of all vCPUs, once they have been read.
    registers: RefCell<Option<Vec<VcpuRegisters>>>,
}

impl Remains {
    /// Whether vcpu-proc has ended, and the machine was kept.
    pub fn is_lost(&self) -> bool {
        self.lost.get()
    }

    /// The vCPUs' last registers, when they have been read.
    pub async fn registers(&self) -> Vec<VcpuRegisters> {
        poll_fn(|_| match &*self.registers.borrow() {
            Some(registers) => Poll::Ready(registers.clone()),
            None => Poll::Pending,
        })
        .await
    }
}

/// Keeps the run pages of a vcpu-proc that is set up and not sealed yet.
///
/// # Errors
/// When it does not hand them over.
pub async fn keep_run_pages(vm: &Vm, helper: &Helper<Vcpu>) -> Result<(), String> {
    let vcpus = usize::from(vm.config.topology.vcpus);
    let mut all = Vec::with_capacity(vcpus);
    while all.len() < vcpus {
        let first = all.len() as u16;
        let said = helper.ask(VcpuRequest::GetRunPages { first }).await;
        match said.map_err(|error: HelperError| error.to_string())? {
            VcpuReply::RunPages(pages) if !pages.is_empty() && pages.len() <= vcpus - all.len() => all.extend(pages),
            _ => return Err("vcpu-proc answered the request for run pages with something else".into()),
        }
    }
    vm.remains.run_pages.replace(all);
    Ok(())
}

/// vcpu-proc has ended, which the machine survives: not its guest, but the evidence.
pub fn vcpus_lost(vm: &Rc<Vm>, why: &str) {
    vm.remains.lost.set(true);
    logging::line(format_args!("{why}: the vCPUs are lost, the machine stops"));
    vm.emit(Event::BulkheadHelperLost {
        role: Role::Vcpu.name().to_owned(),
        reason: logging::printable(why.as_bytes()).to_string(),
    });
    let vm = Rc::clone(vm);
    Rc::clone(&vm).executor.spawn(async move {
        let read = read_registers(&vm).await;
        // With the last page KVM lets go of the machine.
        vm.remains.run_pages.take();
        let registers = read.unwrap_or_else(|error| {
            logging::line(format_args!(
                "the vCPUs' last registers are lost as well, dumps have zeroes instead: {error}"
            ));
            vec![VcpuRegisters::default(); vm.config.topology.vcpus.into()]
        });
        vm.remains.registers.replace(Some(registers));
        stop(vm, Why::HelperLost).await;
    });
}

/// Has a dump-proc read what is in the run pages.
async fn read_registers(vm: &Vm) -> Result<Vec<VcpuRegisters>, String> {
    let helper = looking::start(vm).await?;
    vm.looking.keep(&helper);
    let read = ask_for_registers(vm, &helper).await;
    // Its process is known until it is reaped.
    helper.end();
    read
}

async fn ask_for_registers(vm: &Vm, helper: &Helper<Dump>) -> Result<Vec<VcpuRegisters>, String> {
    let text = |error: HelperError| error.to_string();
    looking::set_up(vm, helper).await?;
    let mut pages = vm.remains.run_pages.take().into_iter().peekable();
    let vcpus = pages.len();
    while pages.peek().is_some() {
        let pages = pages.by_ref().take(RUN_PAGES_PER_MESSAGE).collect();
        helper.ask(DumpRequest::TakeRunPages { pages }).await.map_err(text)?;
    }
    vm.seal_helper(helper).await?;
    match helper.ask(DumpRequest::ReadRunPages).await.map_err(text)? {
        DumpReply::Registers(registers) if registers.len() == vcpus => Ok(registers),
        _ => Err("dump-proc answered the request for registers with something else".into()),
    }
}

/// Why a machine cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// A helper has ended for good.
    HelperLost,
    /// A vCPU has met what KVM cannot do. A reset helps.
    VcpuFailed,
}

/// The machine stops with the run state `internal-error`; then what the command line and `-action` want is done.
pub async fn stop(vm: Rc<Vm>, why: Why) {
    {
        let _turn = vm.change.enter().await;
        if vm.outcome.get().is_some() {
            return;
        }
        let stopped = match vm.state() {
            RunState::Running => lifecycle::halt(&vm, RunState::InternalError).await,
            _ => lifecycle::rest(&vm, RunState::InternalError).await,
        };
        if let Err(error) = stopped {
            return vm.fail_unless_lost(error);
        }
    }
    dump_if_wanted(&vm).await;
    if why == Why::HelperLost {
        let shutdown = vm.actions.get().helper_loss == HelperLossAction::Shutdown;
        // Where no monitor is, nobody could ask for anything any more.
        if (shutdown || vm.monitors.is_empty()) && vm.outcome.get().is_none() {
            vm.emit(Event::Shutdown {
                guest: false,
                reason: ShutdownCause::HostError,
            });
            vm.fail("a helper is lost for good: the machine ends");
        }
    }
}

/// `-dump-on-crash`.
async fn dump_if_wanted(vm: &Vm) {
    let Some(wanted) = &vm.config.dump_on_crash else { return };
    let _dumps = vm.dump.enter().await;
    let _turn = vm.change.enter().await;
    // It may have been reset meanwhile, or told to end.
    if vm.state() == RunState::InternalError && vm.outcome.get().is_none() && !vm.dump_is_cancelled() {
        dump::by_itself(vm, wanted, "the machine has stopped with an internal error").await;
    }
}

/// Why what would have the machine run again is refused, if it cannot.
///
/// # Errors
/// That it cannot.
pub fn check_can_run(vm: &Vm) -> Result<(), QmpError> {
    let lost = match (vm.remains.is_lost(), vm.block.stage()) {
        (true, _) => Role::Vcpu,
        (false, Stage::GivenUp) => Role::Block,
        (false, _) => return Ok(()),
    };
    Err(QmpError::generic(format!(
        "{lost} has ended for good: this machine can be dumped, looked into and ended, but does not run again"
    )))
}
