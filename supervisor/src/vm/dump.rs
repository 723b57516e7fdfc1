//! dump-guest-memory: one dump-proc for one dump.

use super::{Vm, lifecycle};
use crate::helper::{Dump, Helper, HelperError, STORAGE_DEADLINE};
use crate::logging;
use ipc::caps::DumpFd;
use ipc::dump::{DumpEvent, DumpRange, DumpReply, DumpRequest};
use ipc::qmp::{DumpQueryResult, DumpStatus, Event, QmpError, RunState};
use ipc::vcpu::{VcpuReply, VcpuRequest};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::rc::Rc;

/// A checked request.
pub struct Request {
    path: String,
    range: Option<DumpRange>,
}

impl Request {
    /// Checks the arguments in the order in which QEMU does.
    ///
    /// # Errors
    /// QEMU's texts, where QEMU refuses as well.
    pub fn new(paging: bool, protocol: &str, begin: Option<i64>, length: Option<i64>) -> Result<Self, QmpError> {
        let range = match (begin, length) {
            (None, None) => None,
            (Some(_), None) => return Err(QmpError::generic("Parameter 'length' is missing")),
            (None, Some(_)) => return Err(QmpError::generic("Parameter 'begin' is missing")),
            (Some(begin), Some(length)) => Some((begin, length)),
        };
        if paging {
            return Err(QmpError::generic(
                "this version of Bulkhead writes physical memory only: 'paging' must be false",
            ));
        }
        let Some(path) = protocol.strip_prefix("file:") else {
            return Err(QmpError::generic("parameter 'protocol' must start with 'file:'"));
        };
        let range = match range {
            None => None,
            Some((_, 0)) => return Err(QmpError::generic("parameter 'length' expects a non-zero size")),
            Some((begin, length)) => {
                // QEMU 10 succeeds with an empty dump for a negative begin; that is a defect.
                let begin = u64::try_from(begin).map_err(|_| QmpError::generic("dump: no guest memory to dump"))?;
                Some(DumpRange {
                    begin,
                    length: length as u64,
                })
            }
        };
        Ok(Self {
            path: path.to_owned(),
            range,
        })
    }
}

/// Writes a dump: opens the file, stops the machine, starts dump-proc, and lets the machine go on. Detached, it returns
/// when the dump has begun.
pub async fn write(vm: &Rc<Vm>, request: Request, detach: bool) -> Result<(), QmpError> {
    if vm.run.dumping.replace(true) {
        return Err(QmpError::generic(lifecycle::DUMP_IN_PROGRESS));
    }
    let output = match create(&request.path) {
        Ok(output) => output,
        Err(error) => {
            vm.run.dumping.set(false);
            return Err(error);
        }
    };
    if !detach {
        return run(Rc::clone(vm), request, output).await;
    }
    let task = Rc::clone(vm);
    vm.executor.spawn(async move {
        // The event carries the error.
        let _ = run(task, request, output).await;
    });
    Ok(())
}

fn create(path: &str) -> Result<DumpFd, QmpError> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    open(path, flags, Mode::S_IRUSR)
        .map(DumpFd::new)
        .map_err(|errno| QmpError::generic(format!("Could not create '{path}': {}", errno.desc())))
}

async fn run(vm: Rc<Vm>, request: Request, output: DumpFd) -> Result<(), QmpError> {
    let turn = vm.change.enter().await;
    let was_running = vm.state() == RunState::Running;
    let result = stopped(&vm, was_running, &request, output).await;
    let (status, completed, error) = match &result {
        Ok(bytes) => (DumpStatus::Completed, *bytes as i64, None),
        Err(error) => (DumpStatus::Failed, 0, Some(error.clone())),
    };
    if result.is_err() {
        // Half a dump under the final name would be taken for a whole one.
        let _ = nix::unistd::unlink(request.path.as_str());
    }
    let total = request.range.map_or(vm.config.ram_bytes, |range| range.length) as i64;
    vm.emit(Event::DumpCompleted {
        result: DumpQueryResult {
            status,
            completed,
            total: total.max(completed),
        },
        error,
    });
    vm.run.dumping.set(false);
    if was_running
        && vm.outcome.get().is_none()
        && let Err(error) = lifecycle::go(&vm).await
    {
        vm.fail(error);
    }
    drop(turn);
    result.map(drop).map_err(QmpError::generic)
}

/// With the machine stopped: registers, process, dump. Returns the bytes of memory written.
async fn stopped(vm: &Vm, was_running: bool, request: &Request, output: DumpFd) -> Result<u64, String> {
    let text = |error: HelperError| error.to_string();
    if was_running {
        lifecycle::halt(vm, RunState::SaveVm).await.map_err(text)?;
    }
    let VcpuReply::Registers(registers) = vm
        .vcpu()
        .map_err(text)?
        .ask(VcpuRequest::GetRegisters)
        .await
        .map_err(text)?
    else {
        return Err("vcpu-proc answered the register request with something else".into());
    };
    let dumper = vm.start_helper::<Dump>().await?;
    vm.dumper.replace(Some(Rc::clone(&dumper)));
    let written = feed(
        vm,
        &dumper,
        DumpRequest::Write {
            output,
            registers,
            range: request.range,
        },
    )
    .await;
    dumper.end();
    vm.dumper.replace(None);
    written
}

async fn feed(vm: &Vm, dumper: &Helper<Dump>, write: DumpRequest) -> Result<u64, String> {
    let text = |error: HelperError| error.to_string();
    let memory = vm.ram.read_only.try_clone().map_err(|error| error.to_string())?;
    dumper
        .ask(DumpRequest::Setup {
            memory,
            ram_bytes: vm.config.ram_bytes,
        })
        .await
        .map_err(text)?;
    vm.seal_helper(dumper).await?;
    match dumper.ask_within(STORAGE_DEADLINE, write).await.map_err(text)? {
        DumpReply::Written { memory_bytes } => Ok(memory_bytes),
        _ => Err("dump-proc answered the write request with something else".into()),
    }
}

impl Vm {
    /// Progress has no reader yet: query-dump comes with the full dump command.
    pub(super) fn dump_event(&self, event: DumpEvent) {
        let DumpEvent::Progress { .. } = event;
    }

    /// A dump-proc has ended; unless it was told to, its dump fails.
    pub(super) fn dump_ended(&self, pid: i32, how: &str) {
        let dumper = self.dumper.borrow().clone();
        let Some(dumper) = dumper.filter(|dumper| dumper.pid == pid) else {
            return;
        };
        if !dumper.was_told() {
            logging::helper(
                ipc::Role::Dump,
                pid,
                format_args!("has {how}: its dump fails, the machine goes on"),
            );
        }
        dumper.reaped();
    }
}
