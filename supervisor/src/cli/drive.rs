//! Disks: `-drive`.

use super::Invocation;
use super::draft::Draft;
use super::error::UsageError;
use super::given::{Given, checked_path};
use super::keyval::{Keys, Pairs, number, on_off, only, value};
use crate::config::{Cache, Drive};
use ipc::block::{EngineChoice, ImageFormat};
use ipc::virtio::{MAX_DEVICES, MAX_QUEUES};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Image formats.
pub(super) const FORMATS: &[(&str, ImageFormat)] = &[("raw", ImageFormat::Raw), ("qcow2", ImageFormat::Qcow2)];

/// virtio-blk's identity string has room for this many bytes.
const SERIAL_BYTES: usize = 20;

/// `-drive`.
pub(super) static DRIVE_KEYS: Keys = Keys {
    implied: None,
    list: None,
    keys: &[
        value("file"),
        value("if"),
        value("format"),
        value("id"),
        on_off("readonly"),
        on_off("read-only"),
        value("cache"),
        on_off("cache.writeback"),
        on_off("cache.direct"),
        on_off("cache.no-flush"),
        value("aio"),
        value("discard"),
        value("serial"),
        number("num-queues"),
        only("media", &["disk"], "Bulkhead has no CD-ROM drive"),
        only(
            "snapshot",
            &["off"],
            "there are no temporary snapshots: give the guest a copy of the image",
        ),
        only("copy-on-read", &["off"], "what is read from a backing file stays there"),
        only("detect-zeroes", &["off"], "zeroes are written as the guest writes them"),
        only("auto-read-only", &["off"], "readonly= says what a disk is"),
        only("rerror", &["report"], "the guest is told of every read error"),
        only("werror", &["report"], "the guest is told of every write error"),
    ],
};

pub(super) fn drive(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    if pairs
        .get("format")
        .is_some_and(|format| format.value == "help" || format.value == "?")
    {
        draft.answer = Some(Invocation::ListImageFormats);
        return Ok(());
    }
    let file = file(pairs.require("file", "file=FILE names the image or block device")?)?;
    let interface = pairs.require("if", "Bulkhead's disks are virtio disks, write if=virtio")?;
    let has_device = match interface.value.to_str() {
        Some("virtio") => true,
        Some("none") => false,
        _ => {
            return Err(interface.refuse(
                "Bulkhead's disks are virtio disks: if=virtio, or if=none with -device virtio-blk-pci,drive=ID",
            ));
        }
    };
    let formats = || FORMATS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let format = pairs.require(
        "format",
        "formats are not guessed from what a guest may have written, write format=raw or format=qcow2",
    )?;
    let &(_, format) = FORMATS
        .iter()
        .find(|(name, _)| format.value == *name)
        .ok_or_else(|| format.refuse(format!("the supported image formats are: {}", formats())))?;
    let index = draft.drives.len();
    if index >= usize::from(MAX_DEVICES) {
        return Err(pairs.whole.refuse(format!("a machine has at most {MAX_DEVICES} disks")));
    }
    let id = match pairs.get("id") {
        Some(given) => given.identifier()?.to_owned(),
        None => {
            let prefix = if has_device { "virtio" } else { "none" };
            let before = draft.drive_has_device.iter().filter(|other| **other == has_device);
            format!("{prefix}{}", before.count())
        }
    };
    if draft.drives.iter().any(|drive| drive.id == id) {
        let given = pairs.get("id").unwrap_or(&pairs.whole);
        return Err(given.refuse(format!("there is already a drive with the id {id}: give each its own")));
    }
    let cache = cache(pairs)?;
    let engine = engine(pairs, cache)?;
    for other in &draft.drives {
        if engine != EngineChoice::Auto && other.engine != EngineChoice::Auto && other.engine != engine {
            let given = pairs.get("aio").unwrap_or(&pairs.whole);
            return Err(given.refuse(format!("all disks share one I/O engine, and {} has another", other.id)));
        }
    }
    draft.drive_has_device.push(has_device);
    draft.drives.push(Drive {
        id,
        file,
        format,
        read_only: match pairs.switch("readonly")? {
            Some(read_only) => read_only,
            None => pairs.switch("read-only")?.unwrap_or(false),
        },
        cache,
        engine,
        discard: pairs.get("discard").map(discard).transpose()?.unwrap_or(false),
        serial: pairs.get("serial").map(serial).transpose()?.unwrap_or_default(),
        queues: pairs
            .get("num-queues")
            .map(|given| given.number("the count of queues", 1..=MAX_QUEUES))
            .transpose()?,
    });
    Ok(())
}

/// `-allow-path`.
pub(super) fn allow_path(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let path = checked_path(&given.value).map_err(|problem| given.refuse(problem))?;
    draft.allowed_paths.push(path);
    Ok(())
}

/// A local file. QEMU reads a name with a colon before the first slash as a protocol; `file:` is the only one here.
fn file(given: &Given) -> Result<PathBuf, UsageError> {
    let name = given.value.as_bytes();
    let name = name.strip_prefix(b"file:").unwrap_or(name);
    let first_part = name.split(|byte| *byte == b'/').next().unwrap_or_default();
    if first_part.contains(&b':') && given.value.as_bytes() == name {
        return Err(
            given.refuse("disks are local files and block devices; a file whose name has a colon is file=./NAME")
        );
    }
    checked_path(OsStr::from_bytes(name)).map_err(|problem| given.refuse(problem))
}

/// `cache=` stands for three switches; each can be set by itself, too, and then overrides.
fn cache(pairs: &Pairs) -> Result<Cache, UsageError> {
    let default = Cache {
        write_back: true,
        direct: false,
        no_flush: false,
    };
    let mode = match pairs.get("cache") {
        None => default,
        Some(given) => match given.value.to_str() {
            Some("writeback") => default,
            Some("none" | "off") => Cache {
                direct: true,
                ..default
            },
            Some("writethrough") => Cache {
                write_back: false,
                ..default
            },
            Some("directsync") => Cache {
                write_back: false,
                direct: true,
                ..default
            },
            Some("unsafe") => Cache {
                no_flush: true,
                ..default
            },
            _ => return Err(given.refuse("cache is writeback, none, writethrough, directsync or unsafe")),
        },
    };
    Ok(Cache {
        write_back: pairs.switch("cache.writeback")?.unwrap_or(mode.write_back),
        direct: pairs.switch("cache.direct")?.unwrap_or(mode.direct),
        no_flush: pairs.switch("cache.no-flush")?.unwrap_or(mode.no_flush),
    })
}

fn engine(pairs: &Pairs, cache: Cache) -> Result<EngineChoice, UsageError> {
    let Some(given) = pairs.get("aio") else {
        return Ok(EngineChoice::Auto);
    };
    match given.value.to_str() {
        Some("threads") => Ok(EngineChoice::Threads),
        Some("io_uring") => Ok(EngineChoice::IoUring),
        // io_uring does what Linux AIO did. QEMU's condition stays, so that a line means the same on both.
        Some("native") if cache.direct => Ok(EngineChoice::IoUring),
        Some("native") => {
            Err(given.refuse("native I/O goes past the host's page cache: add cache=none or cache.direct=on"))
        }
        _ => Err(given.refuse("aio is threads, io_uring or native")),
    }
}

fn discard(given: &Given) -> Result<bool, UsageError> {
    match given.value.to_str() {
        Some("unmap" | "on") => Ok(true),
        Some("ignore" | "off") => Ok(false),
        _ => Err(given.refuse("discard is unmap (or on), or ignore (or off)")),
    }
}

fn serial(given: &Given) -> Result<String, UsageError> {
    checked_serial(given.text()?).map_err(|problem| given.refuse(problem))
}

/// A disk's serial number.
pub(super) fn checked_serial(text: &str) -> Result<String, String> {
    if text.len() > SERIAL_BYTES {
        return Err(format!("a serial number has at most {SERIAL_BYTES} bytes"));
    }
    Ok(text.to_owned())
}
