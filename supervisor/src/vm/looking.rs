//! Looking into guest memory: memsave, pmemsave, and what the human monitor shows.
//!
//! All of it is dump-proc's work, which has guest RAM read-only and little else: the guest's page tables must not be
//! parsed here, and vcpu-proc, which could, has more to lose (RAM read-write, /dev/kvm's children). A save has a process of
//! its own, that ends with it; short looks share one, which stays, because drgn alone makes thousands of them.

use super::Vm;
use super::fds;
use crate::helper::{Dump, Helper, HelperError, STORAGE_DEADLINE};
use ipc::dump::{DumpOutput, DumpReply, DumpRequest};
use ipc::paging::{AddressSpace, Paging};
use ipc::qmp::QmpError;
use ipc::vcpu::{VcpuRegisters, VcpuReply, VcpuRequest};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

/// Saves that may be under way at a time: each has a process and a file.
const MAX_SAVES: usize = 4;

/// The processes that look.
#[derive(Default)]
pub struct Looking {
    /// For short looks, once there was one.
    reader: RefCell<Option<Rc<Helper<Dump>>>>,
    starting: crate::executor::Turnstile,
    savers: RefCell<Vec<Rc<Helper<Dump>>>>,
    /// Saves that have begun, whether their process runs yet or not.
    saves: Cell<usize>,
}

impl Looking {
    /// Watches a process that has work of its own, until it is reaped.
    pub fn keep(&self, helper: &Rc<Helper<Dump>>) {
        self.savers.borrow_mut().push(Rc::clone(helper));
    }

    /// All that run.
    pub fn helpers(&self) -> Vec<Rc<Helper<Dump>>> {
        let savers = self.savers.borrow();
        self.reader.borrow().iter().chain(savers.iter()).cloned().collect()
    }

    /// One of them, by its process id.
    pub fn helper(&self, pid: i32) -> Option<Rc<Helper<Dump>>> {
        self.helpers().into_iter().find(|helper| helper.pid == pid)
    }

    /// The machine ends.
    pub fn end(&self) {
        self.helpers().iter().for_each(|helper| helper.end());
    }

    /// A process has ended. Returns it when it was one of these.
    pub fn ended(&self, pid: i32) -> Option<Rc<Helper<Dump>>> {
        let helper = self.helper(pid)?;
        self.reader.borrow_mut().take_if(|reader| reader.pid == pid);
        self.savers.borrow_mut().retain(|saver| saver.pid != pid);
        helper.reaped();
        Some(helper)
    }
}

/// Counts a save as long as it lives.
struct Save<'a>(&'a Looking);

impl<'a> Save<'a> {
    fn begin(looking: &'a Looking) -> Result<Self, QmpError> {
        if looking.saves.get() >= MAX_SAVES {
            return Err(QmpError::generic(format!(
                "{MAX_SAVES} saves of guest memory are under way: wait until one of them is done"
            )));
        }
        looking.saves.set(looking.saves.get() + 1);
        Ok(Self(looking))
    }
}

impl Drop for Save<'_> {
    fn drop(&mut self) {
        self.0.saves.set(self.0.saves.get() - 1);
    }
}

fn generic(error: impl std::fmt::Display) -> QmpError {
    QmpError::generic(error.to_string())
}

/// memsave and pmemsave: writes `size` bytes at `address`, without a header. What was in the file before is lost, also when
/// the save fails.
///
/// # Errors
/// QEMU's texts, where QEMU refuses as well.
pub async fn save(
    vm: &Vm,
    cpu_index: Option<Option<i64>>,
    address: i64,
    size: i64,
    filename: &str,
) -> Result<(), QmpError> {
    let address = address.cast_unsigned();
    let Ok(length) = u64::try_from(size) else {
        return Err(QmpError::generic("Parameter 'size' expects a non-negative value"));
    };
    let _save = Save::begin(&vm.looking)?;
    let space = match cpu_index {
        None => AddressSpace::Physical,
        Some(index) => AddressSpace::Virtual(Paging::from(&vcpu_registers(vm, index).await?)),
    };
    let output = create(vm, filename)?;
    let helper = start(vm).await.map_err(generic)?;
    vm.looking.keep(&helper);
    let saved = feed(vm, &helper, output, space, address, length).await;
    // Its process is known until it is reaped.
    helper.end();
    match saved {
        Ok(DumpReply::Saved) => Ok(()),
        Ok(DumpReply::Unmapped) => Err(QmpError::generic(format!(
            "Invalid addr 0x{address:016x}/size {length} specified"
        ))),
        Ok(_) => Err(QmpError::generic(
            "dump-proc answered the save request with something else",
        )),
        Err(error) => Err(QmpError::generic(format!(
            "writing memory to '{filename}' failed: {error}"
        ))),
    }
}

async fn feed(
    vm: &Vm,
    helper: &Helper<Dump>,
    output: DumpOutput,
    space: AddressSpace,
    address: u64,
    length: u64,
) -> Result<DumpReply, String> {
    prepare(vm, helper).await?;
    let request = DumpRequest::Save {
        output,
        space,
        address,
        length,
    };
    let answer = helper.ask_within(STORAGE_DEADLINE, request).await;
    answer.map_err(|error| error.to_string())
}

/// The file that a save makes or overwrites.
fn create(vm: &Vm, path: &str) -> Result<DumpOutput, QmpError> {
    let failed = |errno: Errno| QmpError::generic(format!("Could not open '{path}': {}", errno.desc()));
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC;
    if let Some(set) = fds::set_of(Path::new(path)) {
        return DumpOutput::new(vm.fds.borrow().open(set?, flags)?.into_fd()).map_err(failed);
    }
    // O_NONBLOCK: a FIFO without a reader must not stop the supervisor; it means nothing for files.
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    open(path, flags, Mode::from_bits_truncate(0o666))
        .and_then(DumpOutput::new)
        .map_err(failed)
}

/// The registers of a vCPU, the first if no other is named. It may run, and goes on.
///
/// # Errors
/// When there is no such vCPU.
pub async fn vcpu_registers(vm: &Vm, cpu_index: Option<i64>) -> Result<VcpuRegisters, QmpError> {
    let index = vcpu_index(vm, cpu_index)?;
    let mut all = registers(vm).await?;
    if index < all.len() {
        Ok(all.swap_remove(index))
    } else {
        Err(QmpError::generic("vcpu-proc has fewer registers than vCPUs"))
    }
}

/// Checks a `cpu-index`.
///
/// # Errors
/// When there is no such vCPU.
pub fn vcpu_index(vm: &Vm, cpu_index: Option<i64>) -> Result<usize, QmpError> {
    usize::try_from(cpu_index.unwrap_or(0))
        .ok()
        .filter(|index| *index < usize::from(vm.config.topology.vcpus))
        .ok_or_else(|| QmpError::generic("Parameter 'cpu-index' expects a CPU number"))
}

/// All vCPUs' registers; the last ones when vcpu-proc has ended.
///
/// # Errors
/// When vcpu-proc cannot tell.
pub async fn registers(vm: &Vm) -> Result<Vec<VcpuRegisters>, QmpError> {
    if vm.remains.is_lost() {
        return Ok(vm.remains.registers().await);
    }
    let vcpu = vm.vcpu().map_err(generic)?;
    match vcpu.ask(VcpuRequest::GetRegisters).await.map_err(generic)? {
        VcpuReply::Registers(registers) => Ok(registers),
        _ => Err(QmpError::generic(
            "vcpu-proc answered the register request with something else",
        )),
    }
}

/// Asks the process for short looks, which is started if there is none.
async fn look(vm: &Vm, request: DumpRequest) -> Result<DumpReply, QmpError> {
    let reader = reader(vm).await.map_err(generic)?;
    reader.ask(request).await.map_err(generic)
}

/// Up to `length` bytes at an address: fewer when there is no RAM further on.
///
/// # Errors
/// When the process that reads has failed.
pub async fn read(vm: &Vm, space: AddressSpace, address: u64, length: u32) -> Result<Vec<u8>, QmpError> {
    let request = DumpRequest::Read { space, address, length };
    match look(vm, request).await? {
        DumpReply::Bytes(bytes) if bytes.len() <= length as usize => Ok(bytes),
        _ => Err(QmpError::generic(
            "dump-proc answered the read request with something else",
        )),
    }
}

/// The guest physical address behind a virtual one.
///
/// # Errors
/// When the process that reads has failed.
pub async fn translate(vm: &Vm, paging: Paging, address: u64) -> Result<Option<u64>, QmpError> {
    match look(vm, DumpRequest::Translate { paging, address }).await? {
        DumpReply::Translated(found) => Ok(found),
        _ => Err(QmpError::generic(
            "dump-proc answered the translation request with something else",
        )),
    }
}

async fn reader(vm: &Vm) -> Result<Rc<Helper<Dump>>, String> {
    let _turn = vm.looking.starting.enter().await;
    let running = vm.looking.reader.borrow().clone().filter(|reader| !reader.is_dead());
    if let Some(reader) = running {
        return Ok(reader);
    }
    // The one before is dead, but perhaps not reaped yet: then it is looked for among the savers.
    if let Some(dead) = vm.looking.reader.take() {
        vm.looking.savers.borrow_mut().push(dead);
    }
    let helper = start(vm).await?;
    vm.looking.reader.replace(Some(Rc::clone(&helper)));
    match prepare(vm, &helper).await {
        Ok(()) => Ok(helper),
        Err(error) => {
            helper.end();
            Err(error)
        }
    }
}

/// Starts a process.
///
/// # Errors
/// When it cannot be, or the machine ends.
pub(super) async fn start(vm: &Vm) -> Result<Rc<Helper<Dump>>, String> {
    if vm.dump_is_cancelled() {
        return Err("the machine ends".into());
    }
    let helper = vm.start_helper::<Dump>().await?;
    if vm.dump_is_cancelled() {
        helper.end();
    }
    Ok(helper)
}

/// Hands guest RAM over and has the process sealed.
async fn prepare(vm: &Vm, helper: &Helper<Dump>) -> Result<(), String> {
    set_up(vm, helper).await?;
    vm.seal_helper(helper).await.map(drop)
}

/// Hands guest RAM over.
///
/// # Errors
/// When the process does not take it.
pub(super) async fn set_up(vm: &Vm, helper: &Helper<Dump>) -> Result<(), String> {
    let memory = vm.ram.read_only.try_clone().map_err(|error| error.to_string())?;
    let setup = DumpRequest::Setup {
        memory,
        ram_bytes: vm.config.ram_bytes,
    };
    let done = helper.ask(setup).await;
    done.map(drop).map_err(|error: HelperError| error.to_string())
}
