//! Dumps of a guest that runs on: the memory of one instant.
//!
//! dump-proc is started and sealed first, while the guest runs. Then the disks drain, the vCPUs stop, and in that moment
//! registers are read and writes to guest RAM are held back in both processes that map it. The guest stands no longer
//! than that. vcpu-proc and block-proc make a userfaultfd each for every live dump, and dump-proc alone keeps them: its
//! end, however it comes, closes them, and then the kernel lets everybody write again.

use super::super::{Vm, lifecycle};
use super::{feed, start_dumper};
use crate::executor::Slot;
use crate::helper::{Dump, Helper, HelperError};
use crate::logging;
use ipc::block::{BlockReply, BlockRequest};
use ipc::caps::FaultDeviceFd;
use ipc::dump::{DumpForm, DumpOutput, DumpReply, DumpRequest};
use ipc::qmp::{QmpError, RunState};
use ipc::vcpu::{VcpuRegisters, VcpuReply, VcpuRequest};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use std::rc::Rc;
use std::time::Instant;

/// What userfaultfds that catch the kernel's writes too are made with.
pub struct FaultDevice(Result<FaultDeviceFd, Errno>);

impl FaultDevice {
    const PATH: &'static str = "/dev/userfaultfd";

    /// Opens it, where there is one and this process may.
    pub fn open() -> Self {
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
        Self(nix::fcntl::open(Self::PATH, flags, Mode::empty()).map(FaultDeviceFd::new))
    }

    /// Without one there are no live dumps.
    ///
    /// # Errors
    /// Says so.
    pub fn check(&self) -> Result<(), QmpError> {
        self.get().map(drop).map_err(QmpError::generic)
    }

    fn get(&self) -> Result<&FaultDeviceFd, String> {
        self.0.as_ref().map_err(|errno| {
            let why = match errno {
                Errno::ENOENT => "which this kernel lacks (Linux 6.1, CONFIG_USERFAULTFD)",
                errno => errno.desc(),
            };
            format!("live dumps need {}: {why}", Self::PATH)
        })
    }

    fn copy(&self) -> Result<FaultDeviceFd, String> {
        self.get()?.try_clone().map_err(|error| error.to_string())
    }
}

/// Writes the dump. The caller has not the machine's turn.
pub async fn write(vm: &Vm, form: DumpForm, output: DumpOutput) -> Result<(), String> {
    let dumper = start_dumper(vm).await?;
    let result = match begin(vm, &dumper, form, output).await {
        Ok(written) => written.wait().await,
        Err(reason) => Err(reason),
    };
    // Whatever is still protected is so no more.
    dumper.end();
    vm.dumper.replace(None);
    result
}

/// Has writes held back from an instant on for which the machine stands, and the dump of it begin. The result is in the
/// slot when it is written.
async fn begin(
    vm: &Vm,
    dumper: &Rc<Helper<Dump>>,
    form: DumpForm,
    output: DumpOutput,
) -> Result<Slot<Result<(), String>>, String> {
    let text = |error: HelperError| error.to_string();
    let _turn = vm.change.enter().await;
    watch(vm, dumper, form).await?;
    let said = vm.vcpu().map_err(text)?.ask(VcpuRequest::GetVmCoreInfo).await;
    let VcpuReply::VmCoreInfo(vmcoreinfo) = said.map_err(text)? else {
        return Err("vcpu-proc answered the VMCOREINFO request with something else".into());
    };
    let was_running = vm.state() == RunState::Running;
    let held = lifecycle::hold_disks(vm).await.map_err(text)?;
    let pause_begins = Instant::now();
    let paused = if was_running {
        vm.ask_vcpus(VcpuRequest::Pause).await.map_err(text)
    } else {
        Ok(())
    };
    let registers = match paused {
        Ok(()) => take(vm, dumper).await,
        Err(error) => Err(error),
    };
    let written = Slot::default();
    match registers {
        Ok(registers) => {
            let (dumper, written) = (Rc::clone(dumper), written.clone());
            let request = DumpRequest::Write {
                output,
                registers,
                vmcoreinfo,
                form,
            };
            // At once: when room for old pages runs out only the dump's own progress makes more, and the answers below
            // may wait for that.
            vm.executor
                .spawn(async move { written.fill(feed(&dumper, request).await) });
        }
        Err(reason) => {
            // It may have protected part of the memory.
            dumper.end();
            written.fill(Err(reason));
        }
    }
    // The machine goes on whatever came of it.
    if was_running && vm.outcome.get().is_none() {
        vm.ask_vcpus(VcpuRequest::Run).await.map_err(text)?;
        logging::line(format_args!(
            "live dump: the vCPUs stood for {:.1} ms",
            pause_begins.elapsed().as_secs_f64() * 1e3
        ));
    }
    if held {
        lifecycle::release_disks(vm).await.map_err(text)?;
    }
    Ok(written)
}

/// Gives dump-proc what it holds back the writes of vcpu-proc and block-proc with.
async fn watch(vm: &Vm, dumper: &Helper<Dump>, form: DumpForm) -> Result<(), String> {
    let text = |error: HelperError| error.to_string();
    let mut watches = Vec::new();
    let device = vm.fault_device.copy()?;
    let vcpu = vm.vcpu().map_err(text)?;
    match vcpu.ask(VcpuRequest::WatchMemory { device }).await.map_err(text)? {
        VcpuReply::MemoryWatched(watch) => watches.push(watch),
        _ => return Err("vcpu-proc answered the request for a userfaultfd with something else".into()),
    }
    if let Some(block) = vm.block.get() {
        let device = vm.fault_device.copy()?;
        match block.ask(BlockRequest::WatchMemory { device }).await.map_err(text)? {
            BlockReply::MemoryWatched(watch) => watches.push(watch),
            _ => return Err("block-proc answered the request for a userfaultfd with something else".into()),
        }
    }
    let range = match form {
        DumpForm::Elf { range, .. } => range,
        DumpForm::Kdump { .. } => None,
    };
    done(dumper, DumpRequest::Watch { watches, range }).await
}

/// With vCPUs and disks at rest: what is of this instant.
async fn take(vm: &Vm, dumper: &Helper<Dump>) -> Result<Vec<VcpuRegisters>, String> {
    let text = |error: HelperError| error.to_string();
    let said = vm.vcpu().map_err(text)?.ask(VcpuRequest::GetRegisters).await;
    let VcpuReply::Registers(registers) = said.map_err(text)? else {
        return Err("vcpu-proc answered the register request with something else".into());
    };
    done(dumper, DumpRequest::Arm).await?;
    Ok(registers)
}

async fn done(dumper: &Helper<Dump>, request: DumpRequest) -> Result<(), String> {
    match dumper.ask(request).await.map_err(|error| error.to_string())? {
        DumpReply::Done => Ok(()),
        _ => Err("dump-proc answered a request of a live dump with something else".into()),
    }
}
