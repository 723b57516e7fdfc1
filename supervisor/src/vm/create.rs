//! New images: blockdev-create with its job, and the files that snapshots are made in.
//!
//! The supervisor makes the file, by the authority of whoever named it; block-proc writes what is in it.

use super::{Vm, graph, jobs};
use crate::graph::error::GraphError;
use crate::graph::locks::LockError;
use crate::graph::node::OpenFile;
use crate::graph::open::{self, Opened};
use crate::graph::options::{CommonOptions, DriverOptions, FileOptions, NodeOptions};
use crate::graph::permissions::{Needs, Permissions};
use crate::graph::settings::Settings;
use crate::jobs::Endings;
use crate::objects;
use crate::vm::fds;
use ipc::graph::{self as wire, CreateSpec, GraphRequest, NodeId, Preallocation};
use ipc::image_create::{
    CompressionType, CreateFile, CreateOptions, CreateQcow2, LuksOptions, NewEncryptionFormat, PreallocMode,
    Qcow2Version,
};
use ipc::job::JobType;
use ipc::qmp::QmpError;
use ipc::secret::{SEED_BYTES, Secret, Seed};
use ipc::virtio::IoThreadIndex;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open as open_at};
use nix::sys::stat::Mode;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Whoever makes an image is alone with its file.
const CREATOR: Needs = Needs {
    uses: Permissions::READ.and(Permissions::WRITE).and(Permissions::RESIZE),
    unshared: Permissions::READ.and(Permissions::WRITE).and(Permissions::RESIZE),
};

/// Why an image is not made.
#[derive(Debug, thiserror::Error)]
enum CreateError {
    #[error("Could not create '{}': {}", .0.display(), .1.desc())]
    File(PathBuf, Errno),
    #[error("Backing format cannot be used without backing file")]
    FormatOnly,
    #[error("Cluster size must be a power of two between 512 and 2048k")]
    Cluster,
    #[error("data-file-raw requires data-file")]
    RawWithoutFile,
    #[error("data-file-raw cannot be used with encryption: the data file would not be a raw image")]
    RawEncrypted,
    #[error("Parameter '{0}' is required for cipher")]
    Key(&'static str),
    #[error("iter-time must be greater than 0")]
    IterTime,
    #[error("The requested file size is too large")]
    Size,
    #[error("Refcount width must be a power of two and may not exceed 64 bits")]
    Refcount,
}

impl From<CreateError> for GraphError {
    fn from(error: CreateError) -> Self {
        Self::BlockProc(error.to_string())
    }
}

/// blockdev-create: returns when its job has begun.
///
/// # Errors
/// The error reply, when there cannot be such a job. What goes wrong later is the job's.
pub fn begin(vm: &Rc<Vm>, job: String, options: CreateOptions) -> Result<(), QmpError> {
    let endings = Endings {
        auto_finalize: true,
        auto_dismiss: false,
    };
    let created = vm.jobs.borrow_mut().create(&job, JobType::Create, endings, None)?;
    jobs::announce(vm, created);
    let started = vm.jobs.borrow_mut().start(&job);
    jobs::announce(vm, started);
    vm.jobs.borrow_mut().set_progress(&job, 0, 1);
    let task_vm = Rc::clone(vm);
    vm.executor.spawn(async move {
        let result = create(&task_vm, options).await;
        task_vm.jobs.borrow_mut().set_progress(&job, 1, 1);
        jobs::done_outside(&task_vm, &job, result.map_err(|error| error.to_string())).await;
    });
    Ok(())
}

async fn create(vm: &Rc<Vm>, options: CreateOptions) -> Result<(), GraphError> {
    let _turn = vm.graph_change.enter().await;
    super::devices::need_block(vm).await.map_err(GraphError::BlockProc)?;
    match options {
        CreateOptions::File(CreateFile {
            filename,
            size,
            preallocation,
            // Wishes to file systems that know them; the image is the same without.
            nocow: _,
            extent_size_hint: _,
        }) => {
            let spec = CreateSpec::Raw {
                bytes: size,
                preallocation: preallocation.map_or(Preallocation::Off, space),
            };
            create_file(vm, Path::new(&filename), vec![spec]).await
        }
        CreateOptions::Qcow2(options) => {
            let mut spec = qcow2(&options)?;
            let node = target(vm, &options.file)?;
            let data_file = match &options.data_file {
                Some(name) => Some(target(vm, name)?),
                None if options.data_file_raw == Some(true) => return Err(CreateError::RawWithoutFile.into()),
                None => None,
            };
            if data_file == Some(node) {
                return Err(GraphError::InUse(options.file));
            }
            let is_raw = options.data_file_raw.unwrap_or(false);
            spec.data_file = data_file.map(|data_file| (vm.graph.borrow().filename(data_file), is_raw));
            let mut specs = vec![CreateSpec::Qcow2(spec)];
            if let Some(encrypt) = options.encrypt {
                if is_raw {
                    return Err(CreateError::RawEncrypted.into());
                }
                let luks = encrypt.format == NewEncryptionFormat::Luks;
                let options = encrypt.into();
                let key = key(vm, &options, "encrypt.key-secret")?;
                let luks = luks.then(|| self::luks(&options)).transpose()?;
                let seed = seed()?;
                specs.push(CreateSpec::Encrypt { luks, key, seed });
            }
            format(vm, node, specs, data_file).await
        }
        CreateOptions::Luks(options) => {
            let node = target(vm, &options.file)?;
            let (size, preallocation) = (options.size, options.preallocation);
            let options = options.into();
            let spec = CreateSpec::Luks {
                // Encrypted disks are whole sectors.
                bytes: size.checked_next_multiple_of(512).ok_or(CreateError::Size)?,
                luks: luks(&options)?,
                key: key(vm, &options, "key-secret")?,
                seed: seed()?,
                preallocation: preallocation.map_or(Preallocation::Off, space),
            };
            format(vm, node, vec![spec], None).await
        }
    }
}

/// A node that nobody uses and that can be written.
fn target(vm: &Vm, name: &str) -> Result<NodeId, GraphError> {
    let graph = vm.graph.borrow();
    let node = graph.lookup_any(name)?;
    if graph.is_used(node.id) {
        return Err(GraphError::InUse(node.name.clone()));
    }
    if node.settings.read_only {
        return Err(GraphError::ReadOnly);
    }
    Ok(node.id)
}

/// The password of a new image. `parameter`: what errors call it.
fn key(vm: &Vm, options: &LuksOptions, parameter: &'static str) -> Result<Secret, GraphError> {
    let key = graph::key(vm, options.key_secret.as_deref())?;
    Ok(key.ok_or(CreateError::Key(parameter))?)
}

/// The words are block-proc's to read.
fn luks(options: &LuksOptions) -> Result<wire::CreateLuks, GraphError> {
    let iter_time_ms = options.iter_time.map(|ms| u64::try_from(ms).ok().filter(|ms| *ms > 0));
    Ok(wire::CreateLuks {
        cipher: options.cipher_alg.clone(),
        mode: options.cipher_mode.clone(),
        iv: options.ivgen_alg.clone(),
        iv_hash: options.ivgen_hash_alg.clone(),
        hash: options.hash_alg.clone(),
        iter_time_ms: match iter_time_ms {
            Some(None) => return Err(CreateError::IterTime.into()),
            given => given.flatten(),
        },
    })
}

/// New random bytes from the kernel, for one image.
fn seed() -> Result<Seed, GraphError> {
    let failed = |error: std::io::Error| GraphError::BlockProc(format!("random numbers: {error}"));
    let mut bytes = [0; SEED_BYTES];
    let source = objects::system_source().map_err(|error| GraphError::BlockProc(error.to_string()))?;
    std::fs::File::from(source.into_fd())
        .read_exact(&mut bytes)
        .map_err(failed)?;
    Ok(Seed::new(bytes))
}

/// Makes a file, or empties one that is there, and puts formats on it, one after the other.
///
/// # Errors
/// [`GraphError`]. The file stays.
pub async fn create_file(vm: &Vm, path: &Path, specs: Vec<CreateSpec>) -> Result<(), GraphError> {
    let options = FileOptions {
        is_device: false,
        path: path.into(),
        engine: None,
        locking: true,
    };
    let settings = Settings::default();
    let opened = open::take_over(make(vm, path)?, &options, settings)?;
    let node = NodeOptions {
        name: None,
        common: CommonOptions::default(),
        driver: DriverOptions::File(options),
    };
    let node = graph::add(vm, &node, settings, Opened::of(opened), IoThreadIndex::MAIN).await?;
    let empty = CreateSpec::Raw {
        bytes: 0,
        preallocation: Preallocation::Off,
    };
    let specs = std::iter::once(empty).chain(specs).collect();
    let created = format(vm, node, specs, None).await;
    graph::remove(vm, node).await;
    created
}

fn make(vm: &Vm, path: &Path) -> Result<OwnedFd, GraphError> {
    let flags = OFlag::O_RDWR;
    if let Some(set) = fds::set_of(path) {
        return Ok(vm.fds.borrow().open(set?, flags)?.into_fd());
    }
    // O_NONBLOCK: a FIFO given by mistake must not hang us; it means nothing for files and block devices.
    let flags = flags | OFlag::O_CREAT | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    let made = open_at(path, flags, Mode::from_bits_truncate(0o644));
    Ok(made.map_err(|errno| CreateError::File(path.into(), errno))?)
}

/// Puts formats on a node that nobody uses. Nobody else has the file meanwhile.
async fn format(vm: &Vm, node: NodeId, specs: Vec<CreateSpec>, data_file: Option<NodeId>) -> Result<(), GraphError> {
    let mut files = Vec::new();
    for node in [Some(node), data_file].into_iter().flatten() {
        let file = vm.graph.borrow().node_or_missing(node).file.clone();
        let locked = file.as_ref().map_or(Ok(()), |file| lock(vm, node, file));
        files.extend(file);
        if locked.is_err() {
            files.iter().for_each(|file| file.locks.release(&file.lock));
            return locked;
        }
    }
    let mut result = Ok(());
    for spec in specs {
        result = graph::ask(
            vm,
            GraphRequest::Create {
                file: node,
                spec,
                data_file,
            },
        )
        .await
        .map(drop);
        if result.is_err() {
            break;
        }
    }
    files.iter().for_each(|file| file.locks.release(&file.lock));
    result
}

fn lock(vm: &Vm, node: NodeId, file: &OpenFile) -> Result<(), GraphError> {
    let taken = |permission| GraphError::Locked {
        path: file.path.clone(),
        permission,
    };
    let graph = vm.graph.borrow();
    let is_same = |other: &&crate::graph::node::Node| {
        other.id != node && other.file.as_ref().is_some_and(|open| open.identity == file.identity)
    };
    // Locks do not say so where both have one description of it (a set of fds).
    if graph
        .nodes
        .values()
        .filter(is_same)
        .any(|other| graph.is_used(other.id))
    {
        return Err(taken("write"));
    }
    if !file.is_locked {
        return Ok(());
    }
    file.locks.change(&file.lock, CREATOR).map_err(|error| match error {
        LockError::Taken(permission) => taken(permission),
        LockError::System(errno) => GraphError::Lock {
            path: file.path.clone(),
            errno,
        },
    })
}

fn space(mode: PreallocMode) -> Preallocation {
    match mode {
        PreallocMode::Off => Preallocation::Off,
        PreallocMode::Metadata => Preallocation::Metadata,
        PreallocMode::Falloc => Preallocation::Falloc,
        PreallocMode::Full => Preallocation::Full,
    }
}

/// The rest of what contradicts what is for block-proc to say.
fn qcow2(options: &CreateQcow2) -> Result<wire::CreateQcow2, CreateError> {
    let defaults = wire::CreateQcow2::default();
    if options.backing_fmt.is_some() && options.backing_file.is_none() {
        return Err(CreateError::FormatOnly);
    }
    let format = options.backing_fmt.map(|format| format.name().to_owned());
    let cluster_bytes = options.cluster_size.unwrap_or_else(|| defaults.cluster_bytes.into());
    let refcount_bits = options.refcount_bits.unwrap_or_else(|| defaults.refcount_bits.into());
    Ok(wire::CreateQcow2 {
        bytes: options.size,
        version: match options.version {
            Some(Qcow2Version::V2) => 2,
            Some(Qcow2Version::V3) | None => 3,
        },
        cluster_bytes: u32::try_from(cluster_bytes).map_err(|_| CreateError::Cluster)?,
        refcount_bits: u32::try_from(refcount_bits).map_err(|_| CreateError::Refcount)?,
        extended_l2: options.extended_l2.unwrap_or(false),
        lazy_refcounts: options.lazy_refcounts.unwrap_or(false),
        zstd: options.compression_type == Some(CompressionType::Zstd),
        backing: options.backing_file.clone().map(|name| (name, format)),
        data_file: None,
        preallocation: options.preallocation.map_or(Preallocation::Off, space),
    })
}
