//! dump-guest-memory: one dump-proc for one dump.

mod live;

pub use live::FaultDevice;

use super::fds::{self, Fds};
use super::{Vm, lifecycle, looking, loss};
use crate::config::AutomaticDump;
use crate::executor::{Turn, Turnstile};
use crate::helper::{Dump, Helper, HelperError, STORAGE_DEADLINE};
use crate::logging;
use ipc::dump::{
    Compressor, DumpEvent, DumpForm, DumpOutput, DumpRange, DumpReply, DumpRequest, Exclude, OVERRUN_STATUS,
};
use ipc::memory::{RamRegion, ram_regions};
use ipc::qmp::{DumpCompression, DumpExclude, DumpFormat, DumpQueryResult, DumpStatus, Event, QmpError, RunState};
use ipc::vcpu::{VcpuReply, VcpuRequest};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, fstat, lstat, stat};
use nix::unistd::{Whence, lseek};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// What this build writes.
pub const FORMATS: &[DumpFormat] = &[
    DumpFormat::Elf,
    DumpFormat::KdumpZlib,
    DumpFormat::KdumpRawZlib,
    DumpFormat::KdumpLzo,
    DumpFormat::KdumpRawLzo,
    DumpFormat::KdumpSnappy,
    DumpFormat::KdumpRawSnappy,
    DumpFormat::KdumpZstd,
    DumpFormat::KdumpRawZstd,
];

/// How the latest dump is, or was.
pub struct DumpState {
    status: Cell<DumpStatus>,
    /// Bytes of guest memory.
    completed: Cell<u64>,
    total: Cell<u64>,
    /// It is of a guest that runs on.
    live: Cell<bool>,
    /// That guest was too fast.
    overrun: Cell<bool>,
    /// The machine ends, and does not wait for the dump.
    cancelled: Cell<bool>,
    /// One dump at a time; whoever wants the machine's turn as well takes this one first. A client's is refused instead.
    turn: Turnstile,
}

impl Default for DumpState {
    fn default() -> Self {
        Self {
            status: Cell::new(DumpStatus::None),
            completed: Cell::new(0),
            total: Cell::new(0),
            live: Cell::new(false),
            overrun: Cell::new(false),
            cancelled: Cell::new(false),
            turn: Turnstile::default(),
        }
    }
}

impl DumpState {
    /// Whether a dump is under way: another is refused.
    pub fn is_active(&self) -> bool {
        self.status.get() == DumpStatus::Active
    }

    /// Waits until no dump is under way, and keeps others out.
    pub async fn enter(&self) -> Turn<'_> {
        self.turn.enter().await
    }

    /// Whether a dump is under way that needs the machine to stand.
    pub fn holds_machine(&self) -> bool {
        self.is_active() && !self.live.get()
    }

    /// Why a dump failed, when it failed so.
    fn reason(&self, error: String) -> String {
        if self.cancelled.get() {
            return "the machine ends".into();
        }
        if self.overrun.get() {
            return "dump: the guest changes its memory faster than the live dump is written".into();
        }
        error
    }

    /// query-dump.
    pub fn report(&self) -> DumpQueryResult {
        DumpQueryResult {
            status: self.status.get(),
            completed: self.completed.get() as i64,
            total: self.total.get() as i64,
        }
    }

    /// Takes dump-proc's word for how far it is, as far as it makes sense.
    pub fn progress(&self, event: &DumpEvent) {
        let DumpEvent::Progress { completed, .. } = event;
        if self.is_active() {
            self.completed.set((*completed).min(self.total.get()));
        }
    }

    fn begin(&self, total: u64, live: bool) {
        self.live.set(live);
        self.overrun.set(false);
        self.status.set(DumpStatus::Active);
        self.completed.set(0);
        self.total.set(total);
    }

    fn end(&self, succeeded: bool) {
        if succeeded {
            self.status.set(DumpStatus::Completed);
            self.completed.set(self.total.get());
        } else {
            self.status.set(DumpStatus::Failed);
        }
    }
}

/// dump-guest-memory's arguments, `detach` aside.
pub struct Arguments {
    /// `paging`.
    pub paging: bool,
    /// `protocol`.
    pub protocol: String,
    /// `begin`.
    pub begin: Option<i64>,
    /// `length`.
    pub length: Option<i64>,
    /// `format`.
    pub format: Option<DumpFormat>,
    /// `compression`.
    pub compression: Option<DumpCompression>,
    /// `exclude`.
    pub exclude: Exclude,
    /// `live`.
    pub live: bool,
}

/// The kinds of pages in a list, which may name one twice.
pub fn exclude(kinds: &[DumpExclude]) -> Exclude {
    let has = |kind| kinds.contains(&kind);
    Exclude {
        free: has(DumpExclude::Free),
        cache: has(DumpExclude::Cache),
        user: has(DumpExclude::User),
        zero: has(DumpExclude::Zero),
    }
}

/// A checked request: what to write, and where to.
struct Request {
    output: DumpOutput,
    /// The file that was made for it. It goes when the dump fails: half a dump would be taken for a whole one.
    made: Option<PathBuf>,
    form: DumpForm,
    /// Bytes of guest memory in it.
    memory_bytes: u64,
    /// The guest runs on.
    live: bool,
}

impl Request {
    /// Checks the arguments and opens the output, in the order in which QEMU does; from then on a named fd is used up.
    ///
    /// # Errors
    /// QEMU's texts, where QEMU refuses as well.
    fn new(arguments: &Arguments, fds: &mut Fds, ram_bytes: u64) -> Result<Self, QmpError> {
        let refuse = |desc: &str| Err(QmpError::generic(desc));
        let Arguments {
            paging,
            begin,
            length,
            exclude,
            ..
        } = *arguments;
        let format = arguments.format.unwrap_or(DumpFormat::Elf);
        if format != DumpFormat::Elf && (paging || begin.is_some() || length.is_some()) {
            return refuse("kdump-compressed format doesn't support paging or filter");
        }
        if format == DumpFormat::Elf && exclude.any() {
            return refuse("Parameter 'exclude' needs a kdump-compressed format");
        }
        let range = match (begin, length) {
            (None, None) => None,
            (Some(_), None) => return refuse("Parameter 'length' is missing"),
            (None, Some(_)) => return refuse("Parameter 'begin' is missing"),
            (Some(begin), Some(length)) => Some((begin, length)),
        };
        if !FORMATS.contains(&format) {
            return refuse(&format!("{} is not available now", format.name()));
        }
        let has_choice = matches!(format, DumpFormat::KdumpZlib | DumpFormat::KdumpRawZlib);
        if arguments.compression.is_some() && !has_choice {
            return refuse("Parameter 'compression' is for kdump-zlib and kdump-raw-zlib");
        }
        // Everything in a whole ELF core is pages; in the other formats and in ranges not.
        let in_pages = format == DumpFormat::Elf && range.is_none();
        let (output, made) = open_output(&arguments.protocol, fds, in_pages)?;
        let checked = check_range(range, ram_bytes);
        if let (Err(_), Some(path)) = (&checked, &made) {
            let _ = nix::unistd::unlink(path);
        }
        let (range, memory_bytes) = checked?;
        let Some(form) = form(format, arguments.compression, range, paging, exclude) else {
            return refuse(&format!("{} is not available now", format.name()));
        };
        if !is_seekable(&output) && matches!(form, DumpForm::Kdump { flattened: false, .. }) {
            return refuse("kdump-raw formats require a seekable file");
        }
        Ok(Self {
            output,
            made,
            form,
            memory_bytes,
            live: arguments.live,
        })
    }
}

/// `None`: this build does not write it.
fn form(
    format: DumpFormat,
    compression: Option<DumpCompression>,
    range: Option<DumpRange>,
    paging: bool,
    exclude: Exclude,
) -> Option<DumpForm> {
    let zlib = match compression {
        None | Some(DumpCompression::Fast) => Compressor::Zlib,
        Some(DumpCompression::Small) => Compressor::SmallZlib,
    };
    let (compressor, flattened) = match format {
        DumpFormat::Elf => return Some(DumpForm::Elf { range, paging }),
        DumpFormat::KdumpZlib => (zlib, true),
        DumpFormat::KdumpLzo => (Compressor::Lzo, true),
        DumpFormat::KdumpSnappy => (Compressor::Snappy, true),
        DumpFormat::KdumpRawZlib => (zlib, false),
        DumpFormat::KdumpRawLzo => (Compressor::Lzo, false),
        DumpFormat::KdumpRawSnappy => (Compressor::Snappy, false),
        DumpFormat::KdumpZstd => (Compressor::Zstd, true),
        DumpFormat::KdumpRawZstd => (Compressor::Zstd, false),
        DumpFormat::WinDmp => return None,
    };
    Some(DumpForm::Kdump {
        compressor,
        flattened,
        exclude,
    })
}

/// Whether what is written stays where it is written.
fn is_seekable(output: &DumpOutput) -> bool {
    !output.appends && lseek(&output.fd, 0, Whence::SeekCur).is_ok()
}

fn check_range(range: Option<(i64, i64)>, ram_bytes: u64) -> Result<(Option<DumpRange>, u64), QmpError> {
    let Some((begin, length)) = range else {
        return Ok((None, ram_bytes));
    };
    if length == 0 {
        return Err(QmpError::generic("parameter 'length' expects a non-zero size"));
    }
    let range = u64::try_from(begin).ok().map(|begin| DumpRange {
        begin,
        length: length as u64,
    });
    // QEMU 10 succeeds with an empty dump for a negative begin; that is a defect.
    match range.map(|range| (range, memory_bytes_in(range, ram_bytes))) {
        Some((range, bytes @ 1..)) => Ok((Some(range), bytes)),
        _ => Err(QmpError::generic("dump: no guest memory to dump")),
    }
}

/// How much RAM lies in a range, bytes.
fn memory_bytes_in(range: DumpRange, ram_bytes: u64) -> u64 {
    let end = range.begin.saturating_add(range.length);
    let overlap = |region: RamRegion| {
        let region_end = region.guest_address + region.bytes;
        end.min(region_end)
            .saturating_sub(range.begin.max(region.guest_address))
    };
    ram_regions(ram_bytes).into_iter().map(overlap).sum()
}

/// The output, and the path of a file that was made for it. What is written `in_pages` goes past the page cache where the
/// file system allows it: a dump is read once if ever, and what it would push out of the cache is not.
fn open_output(protocol: &str, fds: &mut Fds, in_pages: bool) -> Result<(DumpOutput, Option<PathBuf>), QmpError> {
    let failed = |errno: Errno| QmpError::generic(format!("Could not create '{protocol}': {}", errno.desc()));
    if let Some(name) = protocol.strip_prefix("fd:") {
        return Ok((blocking(fds.take(name)?.into_fd()).map_err(failed)?, None));
    }
    let Some(path) = protocol.strip_prefix("file:") else {
        return Err(QmpError::generic(
            "parameter 'protocol' must start with 'file:' or 'fd:'",
        ));
    };
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC;
    if let Some(set) = fds::set_of(Path::new(path)) {
        return Ok((blocking(fds.open(set?, flags)?.into_fd()).map_err(failed)?, None));
    }
    // O_NONBLOCK: a FIFO without a reader must not stop the supervisor; it means nothing for files.
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let failed = |errno: Errno| QmpError::generic(format!("Could not create '{path}': {}", errno.desc()));
    // A device is written through the cache: it may have larger blocks than pages.
    let is_device = stat(path).is_ok_and(|status| status.st_mode & libc::S_IFMT != libc::S_IFREG);
    let open_with = |more: OFlag| {
        let direct = match in_pages && !is_device {
            true => open(path, flags | more | OFlag::O_DIRECT, Mode::S_IRUSR),
            false => Err(Errno::EINVAL),
        };
        match direct {
            // Also what a file system answers that does not have this, perhaps after it made the file.
            Err(Errno::EINVAL) => open(path, flags | more, Mode::S_IRUSR),
            other => other,
        }
    };
    let output = match open_with(OFlag::empty()) {
        Err(Errno::EACCES) if is_earlier_dump(path) => {
            nix::unistd::unlink(path).map_err(failed)?;
            open_with(OFlag::O_NOFOLLOW)
        }
        other => other,
    }
    .map_err(failed)?;
    // Of a device or a FIFO only the name is ours to use.
    let is_file = fstat(&output).is_ok_and(|status| status.st_mode & libc::S_IFMT == libc::S_IFREG);
    Ok((blocking(output).map_err(failed)?, is_file.then(|| path.into())))
}

/// Whether a file that may not be written is one that a dump has made. QEMU, as root, writes over such; the supervisor has
/// given up the capability that it takes, and makes a new one in its place.
fn is_earlier_dump(path: &str) -> bool {
    lstat(path).is_ok_and(|status| {
        let mode = status.st_mode;
        mode & libc::S_IFMT == libc::S_IFREG && mode & 0o7777 == Mode::S_IRUSR.bits()
    })
}

/// Has whoever writes wait for whoever reads, as QEMU does. What is opened for appending stays as it is: that flag would
/// go as well.
fn blocking(fd: OwnedFd) -> Result<DumpOutput, Errno> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    if flags.contains(OFlag::O_NONBLOCK) && !flags.intersects(OFlag::O_APPEND | OFlag::O_DIRECT) {
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty()))?;
    }
    DumpOutput::new(fd)
}

/// Writes a dump: opens the output, stops the machine, starts dump-proc, and lets the machine go on. Detached, it returns
/// when the dump has begun.
///
/// # Errors
/// The refusal, or why the dump failed.
pub async fn write(vm: &Rc<Vm>, arguments: &Arguments, detach: bool) -> Result<(), QmpError> {
    if vm.dump.is_active() {
        return Err(QmpError::generic(lifecycle::DUMP_IN_PROGRESS));
    }
    if arguments.live {
        loss::check_can_run(vm)?;
        vm.fault_device.check()?;
    }
    let request = Request::new(arguments, &mut vm.fds.borrow_mut(), vm.config.ram_bytes)?;
    vm.dump.begin(request.memory_bytes, request.live);
    if !detach {
        return run(Rc::clone(vm), request).await;
    }
    let task = Rc::clone(vm);
    vm.executor.spawn(async move {
        // The event carries the error.
        let _ = run(task, request).await;
    });
    Ok(())
}

async fn run(vm: Rc<Vm>, request: Request) -> Result<(), QmpError> {
    let Request {
        output,
        made,
        form,
        live,
        ..
    } = request;
    let _one = vm.dump.turn.enter().await;
    if live {
        let result = live::write(&vm, form, output).await;
        let result = result.map_err(|error| vm.dump.reason(error));
        conclude(&vm, made, &result);
        return result.map_err(QmpError::generic);
    }
    let turn = vm.change.enter().await;
    let was_running = vm.state() == RunState::Running;
    let result = stopped(&vm, was_running, form, output).await;
    conclude(&vm, made, &result);
    if was_running
        && vm.outcome.get().is_none()
        && !vm.dump.cancelled.get()
        && let Err(error) = lifecycle::go(&vm).await
    {
        vm.fail_unless_lost(error);
    }
    drop(turn);
    result.map_err(QmpError::generic)
}

/// A dump is over: half a file goes, the clients are told.
fn conclude(vm: &Vm, made: Option<PathBuf>, result: &Result<(), String>) {
    if result.is_err()
        && let Some(path) = &made
    {
        let _ = nix::unistd::unlink(path);
    }
    vm.dump.end(result.is_ok());
    vm.emit(Event::DumpCompleted {
        result: vm.dump.report(),
        error: result.as_ref().err().cloned(),
    });
}

/// `-dump-on-panic` and `-dump-on-crash`: dumps the memory of a guest that nobody has asked about, for this reason. The caller
/// has the dumps' turn and the machine's, and the machine stands. Nobody may be there to be told, so the log says how it went;
/// the machine goes its way all the same.
pub async fn by_itself(vm: &Vm, wanted: &AutomaticDump, why: &str) {
    let path = wanted.path.display();
    let arguments = Arguments {
        paging: false,
        protocol: format!("file:{path}"),
        begin: None,
        length: None,
        format: Some(wanted.format),
        compression: None,
        exclude: Exclude::default(),
        live: false,
    };
    let request = Request::new(&arguments, &mut vm.fds.borrow_mut(), vm.config.ram_bytes);
    let result = match request {
        Ok(Request {
            output,
            made,
            form,
            memory_bytes,
            ..
        }) => {
            vm.dump.begin(memory_bytes, false);
            let result = stopped(vm, false, form, output).await;
            conclude(vm, made, &result);
            result
        }
        Err(refusal) => Err(refusal.desc),
    };
    match result {
        Ok(()) => logging::line(format_args!("{why}: its memory is in {path}")),
        Err(error) => {
            let error = logging::printable(error.as_bytes());
            logging::line(format_args!("{why}, but its memory could not be dumped: {error}"));
        }
    }
}

/// With the machine stopped: registers, process, dump.
async fn stopped(vm: &Vm, was_running: bool, form: DumpForm, output: DumpOutput) -> Result<(), String> {
    let text = |error: HelperError| error.to_string();
    if was_running {
        lifecycle::halt(vm, RunState::SaveVm).await.map_err(text)?;
    }
    let registers = looking::registers(vm).await.map_err(|error| error.desc)?;
    let vmcoreinfo = match vm.remains.is_lost() {
        // Where the guest said it is, only vcpu-proc knew. It is searched for.
        true => None,
        false => {
            let said = vm.vcpu().map_err(text)?.ask(VcpuRequest::GetVmCoreInfo).await;
            let VcpuReply::VmCoreInfo(vmcoreinfo) = said.map_err(text)? else {
                return Err("vcpu-proc answered the VMCOREINFO request with something else".into());
            };
            vmcoreinfo
        }
    };
    let dumper = start_dumper(vm).await.map_err(|error| vm.dump.reason(error))?;
    let request = DumpRequest::Write {
        output,
        registers,
        vmcoreinfo,
        form,
    };
    let written = feed(&dumper, request).await;
    dumper.end();
    vm.dumper.replace(None);
    written.map_err(|error| vm.dump.reason(error))
}

/// Starts the process of a dump and has it sealed.
async fn start_dumper(vm: &Vm) -> Result<Rc<Helper<Dump>>, String> {
    let dumper = vm.start_helper::<Dump>().await?;
    if vm.dump.cancelled.get() {
        dumper.end();
    }
    vm.dumper.replace(Some(Rc::clone(&dumper)));
    let sealed = seal_dumper(vm, &dumper).await;
    if sealed.is_err() {
        dumper.end();
        vm.dumper.replace(None);
    }
    sealed.map(|()| dumper)
}

async fn seal_dumper(vm: &Vm, dumper: &Helper<Dump>) -> Result<(), String> {
    let memory = vm.ram.read_only.try_clone().map_err(|error| error.to_string())?;
    dumper
        .ask(DumpRequest::Setup {
            memory,
            ram_bytes: vm.config.ram_bytes,
        })
        .await
        .map_err(|error| error.to_string())?;
    vm.seal_helper(dumper).await.map(drop)
}

async fn feed(dumper: &Helper<Dump>, write: DumpRequest) -> Result<(), String> {
    let text = |error: HelperError| error.to_string();
    match dumper.ask_within(STORAGE_DEADLINE, write).await.map_err(text)? {
        DumpReply::Written { .. } => Ok(()),
        _ => Err("dump-proc answered the write request with something else".into()),
    }
}

impl Vm {
    /// The machine ends: a dump that is under way fails.
    pub(super) fn cancel_dump(&self) {
        self.dump.cancelled.set(true);
        if let Some(dumper) = self.dumper.borrow().as_ref() {
            dumper.end();
        }
        self.looking.end();
    }

    /// Memory is not watched any more by whoever has ended: a live dump would not be of one moment.
    pub(super) fn give_up_live_dump(&self, why: &str) {
        let is_live = self.dump.is_active() && self.dump.live.get();
        if let Some(dumper) = self.dumper.borrow().as_ref().filter(|_| is_live) {
            dumper.kill(why);
        }
    }

    /// Whether the machine ends.
    pub(super) fn dump_is_cancelled(&self) -> bool {
        self.dump.cancelled.get()
    }

    /// A dump-proc has ended; unless it was told to, its dump fails.
    pub(super) fn dump_ended(&self, pid: i32, code: i32, status: i32, how: &str) {
        if let Some(helper) = self.looking.ended(pid) {
            if !helper.was_told() {
                let text = format_args!("has {how}: what it read is lost, the machine goes on");
                logging::helper(ipc::Role::Dump, pid, text);
            }
            return;
        }
        let dumper = self.dumper.borrow().clone();
        let Some(dumper) = dumper.filter(|dumper| dumper.pid == pid) else {
            return;
        };
        let overrun = (code, status) == (libc::CLD_EXITED, OVERRUN_STATUS);
        self.dump.overrun.set(overrun);
        // With its last answer its work is done, and it ends by itself.
        if !dumper.was_told() && dumper.owes_an_answer() {
            logging::helper(
                ipc::Role::Dump,
                pid,
                format_args!("has {how}: its dump fails, the machine goes on"),
            );
        }
        dumper.reaped();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_range_counts_the_ram_in_it_and_no_hole() {
        for (begin, length, ram_bytes, expected) in [
            (0, 4096, GIB, 4096),
            (100, 5000, GIB, 5000),
            (GIB - 3, 1000, GIB, 3),
            (GIB, 1, GIB, 0),
            (0, u64::MAX, GIB, GIB),
            // The PCI hole lies between 3 and 4 GiB.
            (0, u64::MAX, 5 * GIB, 5 * GIB),
            (3 * GIB - 1, GIB + 2, 5 * GIB, 2),
            (3 * GIB, GIB, 5 * GIB, 0),
            (u64::MAX, u64::MAX, 5 * GIB, 0),
        ] {
            let range = DumpRange { begin, length };
            assert_eq!(memory_bytes_in(range, ram_bytes), expected, "{range:?} of {ram_bytes}");
        }
    }

    #[test]
    fn what_is_refused_before_a_name_is_looked_up_uses_no_fd_up() {
        let null = || {
            Some(ipc::caps::ClientGivenFd::new(
                std::fs::File::open("/dev/null").unwrap().into(),
            ))
        };
        let mut fds = Fds::default();
        fds.name("d".into(), null()).unwrap();
        let arguments = |format, begin, length| Arguments {
            paging: false,
            protocol: "fd:d".into(),
            begin,
            length,
            format,
            compression: None,
            exclude: Exclude::default(),
            live: false,
        };
        for (format, begin, length, desc) in [
            (
                Some(DumpFormat::KdumpZlib),
                Some(0),
                None,
                "kdump-compressed format doesn't support paging or filter",
            ),
            (None, Some(0), None, "Parameter 'length' is missing"),
            (Some(DumpFormat::WinDmp), None, None, "win-dmp is not available now"),
        ] {
            let refused = Request::new(&arguments(format, begin, length), &mut fds, GIB)
                .err()
                .unwrap();
            assert_eq!(refused.desc, desc);
        }
        let refused = Request::new(&arguments(None, Some(0), Some(0)), &mut fds, GIB)
            .err()
            .unwrap();
        assert_eq!(refused.desc, "parameter 'length' expects a non-zero size");
        assert_eq!(
            fds.take("d").err().unwrap().to_string(),
            "File descriptor named 'd' has not been found"
        );
    }

    #[test]
    fn dump_proc_cannot_report_more_than_there_is() {
        let state = DumpState::default();
        let progress = |completed| state.progress(&DumpEvent::Progress { completed, total: 7 });
        progress(5);
        assert_eq!(state.report().completed, 0, "no dump is under way");
        state.begin(100, false);
        progress(40);
        assert_eq!((state.report().completed, state.report().total), (40, 100));
        progress(u64::MAX);
        assert_eq!(state.report().completed, 100);
        state.end(false);
        assert_eq!(state.report().status, DumpStatus::Failed);
    }
}
