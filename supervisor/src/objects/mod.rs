//! The objects that the command line and clients create: what they are, and what they hold open.
//!
//! A new object is first a [`Spec`], checked and typed, then an [`Object`] with its file, its memory or its thread. Who
//! uses an object is written in the machine's configuration; an object that is used stays.

pub mod secret;
pub mod spec;
pub mod throttle;

use crate::ram::Ram;
use crate::vm::fds::{self, FdError, Fds};
use ipc::block::Polling;
use ipc::caps::RngSourceFd;
use ipc::qmp::QmpError;
use ipc::virtio::IoThreadIndex;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use secret::Secret;
use spec::MemorySpec;
pub use spec::Spec;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use throttle::Limits;

/// How many objects there may be: a compromised qmp-proc can ask as often as it likes.
const MAX_OBJECTS: usize = 256;
/// Where rng-builtin and a virtio-rng device without a backend get their bytes.
const SYSTEM_SOURCE: &str = "/dev/urandom";

/// Why an object is not made, changed or deleted.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// A word that is not one of those possible.
    #[error("Parameter '{0}' does not accept value '{1}'")]
    Word(String, String),
    /// An id that begins with a digit, for instance.
    #[error("Parameter 'id' expects an identifier")]
    Identifier,
    /// A property that the type does not have.
    #[error("Parameter '{0}' is unexpected")]
    Unexpected(String),
    /// A property that must be given.
    #[error("Parameter '{0}' is missing")]
    Missing(&'static str),
    /// A value of another type.
    #[error("Invalid parameter type for '{0}', expected: {1}")]
    Type(String, &'static str),
    /// An iothread's property below 0.
    #[error("{0} value must be in range [0, 9223372036854775807]")]
    Negative(String),
    /// Memory of no size.
    #[error("property 'size' of {0} doesn't take value '0'")]
    NoSize(&'static str),
    /// Memory of an impossible size.
    #[error("'size' of {0} bytes is not possible: whole pages of 4 KiB, at most 4 TiB")]
    Size(u64),
    /// `seal=off`.
    #[error("'seal' must be on: the memory is shared between processes, none of which may change its size")]
    Unsealed,
    /// A NUL byte in a file name.
    #[error("a file name cannot hold a NUL byte")]
    Nul,
    /// `data` and `file`.
    #[error("'file' and 'data' are mutually exclusive")]
    TwoSecrets,
    /// Neither.
    #[error("Either 'file' or 'data' must be provided")]
    NoSecret,
    /// A secret that is not in base64.
    #[error("the secret is not valid base64 data")]
    Base64,
    /// A secret's file that is too long.
    #[error("{0}: a file with a secret has at most 1 MiB")]
    LongSecret(PathBuf),
    /// A file cannot be opened.
    #[error("Could not open '{path}': {}", .errno.desc())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        errno: Errno,
    },
    /// A file cannot be read.
    #[error("Unable to read {path}: {problem}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// A set of file descriptors.
    #[error(transparent)]
    FdSet(#[from] FdError),
    /// Limits that contradict each other.
    #[error("{0}")]
    Limits(&'static str),
    /// Memory cannot be made.
    #[error("{0}")]
    Memory(String),
    /// Memory that is asked for too late.
    #[error("memory backends are made when the machine starts: use -object memory-backend-memfd")]
    LateMemory,
    /// All threads are in use.
    #[error("no I/O thread is free: {0} could be added to this machine (-spare-iothreads allows more)")]
    NoThread(u8),
    /// An id that is taken.
    #[error("attempt to add duplicate property '{0}' to object (type 'container')")]
    Duplicate(String),
    /// Too many.
    #[error("there are {MAX_OBJECTS} objects already: delete some")]
    Full,
    /// object-del: there is none.
    #[error("object '{0}' not found")]
    NotFound(String),
    /// object-del: something uses it.
    #[error("object '{0}' is in use, can not be deleted")]
    InUse(String),
}

impl ObjectError {
    fn read(path: &Path, error: &std::io::Error) -> Self {
        Self::Read {
            path: path.to_owned(),
            problem: error.to_string(),
        }
    }
}

impl From<ObjectError> for QmpError {
    fn from(error: ObjectError) -> Self {
        Self::generic(error.to_string())
    }
}

/// An object.
pub struct Object {
    /// Its name below `/objects`.
    pub id: String,
    /// What it is.
    pub backend: Backend,
}

/// What an object is and holds.
pub enum Backend {
    /// iothread: a thread of block-proc.
    IoThread {
        /// Which.
        thread: IoThreadIndex,
        /// How it polls.
        polling: Polling,
    },
    /// memory-backend-memfd. The machine's RAM has been handed over to the machine.
    Memory {
        /// What was asked for.
        spec: MemorySpec,
        /// The memory, unless it has become the machine's.
        ram: Option<Ram>,
    },
    /// rng-builtin.
    RngBuiltin(RngSourceFd),
    /// rng-random.
    RngRandom {
        /// Its file.
        filename: PathBuf,
        /// The same, open.
        source: RngSourceFd,
    },
    /// secret.
    Secret(Secret),
    /// throttle-group.
    ThrottleGroup(Limits),
}

impl Backend {
    /// `qom-type`.
    pub fn qom_type(&self) -> &'static str {
        match self {
            Self::IoThread { .. } => "iothread",
            Self::Memory { .. } => "memory-backend-memfd",
            Self::RngBuiltin(_) => "rng-builtin",
            Self::RngRandom { .. } => "rng-random",
            Self::Secret(_) => "secret",
            Self::ThrottleGroup(_) => "throttle-group",
        }
    }

    /// The thread and how it polls, if it is an iothread.
    pub fn io_thread(&self) -> Option<(IoThreadIndex, Polling)> {
        match self {
            Self::IoThread { thread, polling } => Some((*thread, *polling)),
            _ => None,
        }
    }

    /// Where random bytes come from, if it gives any.
    pub fn rng_source(&self) -> Option<&RngSourceFd> {
        match self {
            Self::RngBuiltin(source) | Self::RngRandom { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// All objects, in the order in which they were made.
#[derive(Default)]
pub struct Objects {
    list: Vec<Object>,
    /// How many threads block-proc has for iothreads.
    threads: u8,
}

impl Objects {
    /// Makes the objects of the command line; `spare` more iothreads can come later.
    ///
    /// # Errors
    /// The id of the first that cannot be made, and why.
    pub fn from_command_line(specs: &[(String, Spec)], spare: u8, given: &Fds) -> Result<Self, (String, ObjectError)> {
        let io_threads = specs
            .iter()
            .filter(|(_, spec)| matches!(spec, Spec::IoThread(_)))
            .count();
        let mut objects = Self {
            list: Vec::new(),
            threads: u8::try_from(io_threads).unwrap_or(u8::MAX).saturating_add(spare),
        };
        for (id, spec) in specs {
            let made = match spec {
                Spec::Memory(spec) => allocate(*spec),
                spec => objects.make(spec.clone(), given),
            };
            let added = made.and_then(|backend| objects.add(id.clone(), backend));
            added.map_err(|error| (id.clone(), error))?;
        }
        Ok(objects)
    }

    /// Makes an object while the machine runs.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub fn create(&mut self, id: String, spec: Spec, given: &Fds) -> Result<(), ObjectError> {
        if matches!(spec, Spec::Memory(_)) {
            return Err(ObjectError::LateMemory);
        }
        // Before anything is opened.
        if self.get(&id).is_some() {
            return Err(ObjectError::Duplicate(id));
        }
        let backend = self.make(spec, given)?;
        self.add(id, backend)
    }

    fn make(&self, spec: Spec, given: &Fds) -> Result<Backend, ObjectError> {
        Ok(match spec {
            Spec::IoThread(polling) => Backend::IoThread {
                thread: self.free_thread().ok_or(ObjectError::NoThread(self.threads))?,
                polling,
            },
            Spec::Memory(_) => return Err(ObjectError::LateMemory),
            Spec::RngBuiltin => Backend::RngBuiltin(system_source()?),
            Spec::RngRandom(filename) => Backend::RngRandom {
                source: open_source(&filename, given)?,
                filename,
            },
            Spec::Secret(source, format) => Backend::Secret(Secret::load(source, format)?),
            Spec::ThrottleGroup(limits) => Backend::ThrottleGroup(limits),
        })
    }

    fn add(&mut self, id: String, backend: Backend) -> Result<(), ObjectError> {
        if self.get(&id).is_some() {
            return Err(ObjectError::Duplicate(id));
        }
        if self.list.len() >= MAX_OBJECTS {
            return Err(ObjectError::Full);
        }
        self.list.push(Object { id, backend });
        Ok(())
    }

    fn free_thread(&self) -> Option<IoThreadIndex> {
        let taken = |index| {
            self.list
                .iter()
                .any(|object| matches!(object.backend, Backend::IoThread { thread, .. } if thread == index))
        };
        (1..=self.threads).map(IoThreadIndex).find(|index| !taken(*index))
    }

    /// How many threads block-proc has for iothreads.
    pub fn threads(&self) -> u8 {
        self.threads
    }

    /// The object of this id.
    pub fn get(&self, id: &str) -> Option<&Backend> {
        self.list
            .iter()
            .find(|object| object.id == id)
            .map(|object| &object.backend)
    }

    /// The same, to change it.
    pub fn get_mut(&mut self, id: &str) -> Option<&mut Backend> {
        let found = self.list.iter_mut().find(|object| object.id == id);
        found.map(|object| &mut object.backend)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Object> {
        self.list.iter()
    }

    /// Takes an object away.
    ///
    /// # Errors
    /// When there is none.
    pub fn remove(&mut self, id: &str) -> Result<Backend, ObjectError> {
        let place = self.list.iter().position(|object| object.id == id);
        let place = place.ok_or_else(|| ObjectError::NotFound(id.to_owned()))?;
        Ok(self.list.remove(place).backend)
    }

    /// The memory of a backend, for the machine's RAM.
    pub fn take_memory(&mut self, id: &str) -> Option<Ram> {
        match self.get_mut(id)? {
            Backend::Memory { ram, .. } => ram.take(),
            _ => None,
        }
    }

    /// The thread of an iothread, and how it polls.
    pub fn io_thread(&self, id: &str) -> Option<(IoThreadIndex, Polling)> {
        self.get(id)?.io_thread()
    }
}

fn allocate(spec: MemorySpec) -> Result<Backend, ObjectError> {
    let ram = Ram::new(spec.bytes).map_err(ObjectError::Memory)?;
    if spec.prealloc {
        ram.fill(spec.bytes).map_err(ObjectError::Memory)?;
    }
    Ok(Backend::Memory { spec, ram: Some(ram) })
}

/// The kernel's random numbers.
///
/// # Errors
/// When the host has no /dev/urandom.
pub fn system_source() -> Result<RngSourceFd, ObjectError> {
    let path = Path::new(SYSTEM_SOURCE);
    let fd = open_read_only(path).map_err(|errno| ObjectError::Open {
        path: path.to_owned(),
        errno,
    })?;
    Ok(RngSourceFd::new(fd))
}

fn open_source(path: &Path, given: &Fds) -> Result<RngSourceFd, ObjectError> {
    if let Some(set) = fds::set_of(path) {
        return Ok(RngSourceFd::new(given.open(set?, OFlag::O_RDONLY)?.into_fd()));
    }
    let failed = |errno| ObjectError::Open {
        path: path.to_owned(),
        errno,
    };
    open_read_only(path).map(RngSourceFd::new).map_err(failed)
}

/// Opens a file, a device or a FIFO for reading that blocks. The opening itself does not: a FIFO may have no writer yet.
fn open_read_only(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let fd = open(path, flags, Mode::empty())?;
    if SFlag::from_bits_truncate(fstat(&fd)?.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFDIR {
        return Err(Errno::EISDIR);
    }
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(fd)
}
