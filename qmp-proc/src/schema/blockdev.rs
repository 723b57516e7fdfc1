//! Types of the commands about block nodes, and blockdev-add's two forms.
//!
//! Servers of today take a node's options as the arguments; those of the time of QMP 2.0 took them in `options`, with the id
//! of the drive that they made of it. [`wrapped`] reads the old form.

use super::check;
use super::types::IntType;
use super::types::{
    AlternateType, CommandType, EnumType, INT, NOTHING, StructType, Type, Variants, enumeration, optional, required,
    structure, supervised,
};
use crate::json::{Object, Value, de};
use ipc::blockdev::{BackendOptions, FlatOptions, NewBlockdev};
use ipc::graph::OnError;
use ipc::qmp::{Command, QmpError};

/// Bytes, or another number that is not negative.
const SIZE: Type = Type::Int(IntType::Size);

pub(super) const ADD: CommandType = supervised("blockdev-add", &OPTIONS, NOTHING);
pub(super) const DEL: CommandType = supervised("blockdev-del", &DEL_ARGUMENTS, NOTHING);
pub(super) const REOPEN: CommandType = supervised("blockdev-reopen", &REOPEN_ARGUMENTS, NOTHING);

static DEL_ARGUMENTS: StructType = structure("q_obj_blockdev-del-arg", &[required("node-name", Type::Str)]);
static REOPEN_ARGUMENTS: StructType = structure(
    "q_obj_blockdev-reopen-arg",
    &[required("options", Type::Array(&Type::Struct(&OPTIONS)))],
);

/// A node.
pub(super) static OPTIONS: StructType = StructType {
    name: "BlockdevOptions",
    members: &[
        required("driver", Type::Enum(&DRIVER)),
        optional("node-name", Type::Str),
        optional("discard", Type::Enum(&DISCARD)),
        optional("cache", Type::Struct(&CACHE)),
        optional("active", Type::Bool),
        optional("read-only", Type::Bool),
        optional("auto-read-only", Type::Bool),
        optional("force-share", Type::Bool),
        optional("detect-zeroes", Type::Enum(&DETECT_ZEROES)),
    ],
    variants: Some(&Variants {
        tag: "driver",
        of: &[
            ("blkdebug", &super::blkdebug::BLKDEBUG),
            ("copy-on-read", &GENERIC_FORMAT),
            ("file", &FILE),
            ("host_device", &FILE),
            ("luks", &LUKS),
            ("nbd", &NBD),
            ("null-aio", &NULL),
            ("null-co", &NULL),
            ("qcow2", &QCOW2),
            ("raw", &RAW),
            ("throttle", &THROTTLE),
        ],
    }),
};
/// The drivers that block-proc has.
static DRIVER: EnumType = enumeration(
    "BlockdevDriver",
    &[
        "blkdebug",
        "copy-on-read",
        "file",
        "host_device",
        "luks",
        "nbd",
        "null-aio",
        "null-co",
        "qcow2",
        "raw",
        "throttle",
    ],
);
static DISCARD: EnumType = enumeration("BlockdevDiscardOptions", &["ignore", "unmap"]);
pub(super) static DETECT_ZEROES: EnumType = enumeration("BlockdevDetectZeroesOptions", &["off", "on", "unmap"]);
static CACHE: StructType = structure(
    "BlockdevCacheOptions",
    &[optional("direct", Type::Bool), optional("no-flush", Type::Bool)],
);

/// A node that exists, or one that comes along.
pub(super) static BLOCKDEV_REF: AlternateType = AlternateType {
    name: "BlockdevRef",
    branches: &[("definition", Type::Struct(&OPTIONS)), ("reference", Type::Str)],
};
static BLOCKDEV_REF_OR_NULL: AlternateType = AlternateType {
    name: "BlockdevRefOrNull",
    branches: &[
        ("definition", Type::Struct(&OPTIONS)),
        ("reference", Type::Str),
        ("null", Type::Null),
    ],
};

static FILE: StructType = structure(
    "BlockdevOptionsFile",
    &[
        required("filename", Type::Str),
        optional("locking", Type::Enum(&ON_OFF_AUTO)),
        optional("aio", Type::Enum(&AIO)),
    ],
);
static ON_OFF_AUTO: EnumType = enumeration("OnOffAuto", &["auto", "on", "off"]);
static AIO: EnumType = enumeration("BlockdevAioOptions", &["threads", "native", "io_uring"]);
static RAW: StructType = structure(
    "BlockdevOptionsRaw",
    &[
        required("file", Type::Alternate(&BLOCKDEV_REF)),
        optional("offset", INT),
        optional("size", INT),
    ],
);
static GENERIC_FORMAT: StructType = structure(
    "BlockdevOptionsGenericFormat",
    &[required("file", Type::Alternate(&BLOCKDEV_REF))],
);
static NULL: StructType = structure(
    "BlockdevOptionsNull",
    &[
        optional("size", INT),
        optional("latency-ns", SIZE),
        optional("read-zeroes", Type::Bool),
    ],
);
static NBD: StructType = structure(
    "BlockdevOptionsNbd",
    &[
        required("server", Type::Struct(&super::chardev::SOCKET_ADDRESS)),
        optional("export", Type::Str),
        optional("reconnect-delay", Type::Int(UINT32)),
        optional("open-timeout", Type::Int(UINT32)),
    ],
);
/// Seconds.
const UINT32: IntType = IntType::Narrow {
    name: "uint32_t",
    min: 0,
    max: u32::MAX as i64,
};
static THROTTLE: StructType = structure(
    "BlockdevOptionsThrottle",
    &[
        required("throttle-group", Type::Str),
        required("file", Type::Alternate(&BLOCKDEV_REF)),
    ],
);
static QCOW2: StructType = structure(
    "BlockdevOptionsQcow2",
    &[
        required("file", Type::Alternate(&BLOCKDEV_REF)),
        optional("backing", Type::Alternate(&BLOCKDEV_REF_OR_NULL)),
        optional("lazy-refcounts", Type::Bool),
        optional("overlap-check", Type::Alternate(&OVERLAP_CHECKS)),
        optional("cache-size", INT),
        optional("l2-cache-size", INT),
        optional("refcount-cache-size", INT),
        optional("data-file", Type::Alternate(&BLOCKDEV_REF)),
        optional("encrypt", Type::Struct(&QCOW2_ENCRYPTION)),
    ],
);
static QCOW2_ENCRYPTION: StructType = StructType {
    name: "BlockdevQcow2Encryption",
    members: &[required("format", Type::Enum(&super::block_info::ENCRYPTION_FORMAT))],
    variants: Some(&Variants {
        tag: "format",
        of: &[("aes", &QCOW_KEY), ("luks", &LUKS_KEY)],
    }),
};
static QCOW_KEY: StructType = structure("QCryptoBlockOptionsQCow", &[optional("key-secret", Type::Str)]);
static LUKS_KEY: StructType = structure("QCryptoBlockOptionsLUKS", &[optional("key-secret", Type::Str)]);
static LUKS: StructType = structure(
    "BlockdevOptionsLUKS",
    &[
        required("file", Type::Alternate(&BLOCKDEV_REF)),
        optional("key-secret", Type::Str),
    ],
);
static OVERLAP_CHECKS: AlternateType = AlternateType {
    name: "Qcow2OverlapChecks",
    branches: &[
        ("flags", Type::Struct(&OVERLAP_CHECK_FLAGS)),
        ("mode", Type::Enum(&OVERLAP_CHECK_MODE)),
    ],
};
static OVERLAP_CHECK_MODE: EnumType = enumeration("Qcow2OverlapCheckMode", &["none", "constant", "cached", "all"]);
static OVERLAP_CHECK_FLAGS: StructType = structure(
    "Qcow2OverlapCheckFlags",
    &[
        optional("template", Type::Enum(&OVERLAP_CHECK_MODE)),
        optional("main-header", Type::Bool),
        optional("active-l1", Type::Bool),
        optional("active-l2", Type::Bool),
        optional("refcount-table", Type::Bool),
        optional("refcount-block", Type::Bool),
        optional("snapshot-table", Type::Bool),
        optional("inactive-l1", Type::Bool),
        optional("inactive-l2", Type::Bool),
        optional("bitmap-directory", Type::Bool),
    ],
);
/// blockdev-add in QMP 2.0's form: what an `options` with an `id` means. Without an id it was no valid command then, and is
/// not one now.
///
/// # Errors
/// The error reply.
pub(super) fn wrapped(command: &CommandType, arguments: &Object) -> Option<Result<Command, QmpError>> {
    if command.name != ADD.name {
        return None;
    }
    let Some(Value::Object(options)) = arguments.get("options") else {
        return None;
    };
    let is_alone = arguments.iter().count() == 1;
    (is_alone && options.get("id").is_some()).then(|| read_wrapped(options.clone()))
}

fn read_wrapped(mut options: Object) -> Result<Command, QmpError> {
    let text = |value: Option<Value>, name: &str| match value {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.into_string())),
        Some(_) => Err(QmpError::generic(format!(
            "Invalid parameter type for 'options.{name}', expected: string"
        ))),
    };
    let id = text(options.remove("id"), "id")?.unwrap_or_default();
    let read_error = action(text(options.remove("rerror"), "rerror")?, "rerror", OnError::Report)?;
    let write_error = action(text(options.remove("werror"), "werror")?, "werror", OnError::Enospc)?;
    let mut write_cache = true;
    if let Some(Value::Object(mut cache)) = options.remove("cache") {
        match cache.remove("writeback") {
            None => {}
            Some(Value::Bool(writeback)) => write_cache = writeback,
            Some(_) => {
                return Err(QmpError::generic(
                    "Invalid parameter type for 'options.cache.writeback', expected: boolean",
                ));
            }
        }
        options.push("cache", Value::Object(cache));
    }
    // It was an option of every node; now it is one of the file below.
    if let Some(aio) = options.remove("aio") {
        options = with_aio(options, &aio);
    }
    let options = check::arguments(&ADD, options)?;
    let options: FlatOptions = de::from_value(Value::Object(options))
        .map_err(|mismatch| QmpError::generic(format!("{}: {mismatch}", ADD.name)))?;
    Ok(Command::BlockdevAdd(NewBlockdev {
        options,
        backend: Some(BackendOptions {
            id,
            write_cache,
            read_error,
            write_error,
        }),
    }))
}

fn with_aio(options: Object, aio: &Value) -> Object {
    let is_file = matches!(
        options.get("driver").and_then(Value::as_str),
        Some("file" | "host_device")
    );
    let mut changed = Object::new();
    for (name, value) in options.into_entries() {
        match value {
            Value::Object(below) if &*name == "file" => changed.push(name, Value::Object(with_aio(below, aio))),
            value => changed.push(name, value),
        }
    }
    if is_file {
        changed.push("aio", aio.clone());
    }
    changed
}

fn action(word: Option<String>, name: &str, default: OnError) -> Result<OnError, QmpError> {
    match word.as_deref() {
        None => Ok(default),
        Some("report") => Ok(OnError::Report),
        Some("ignore") => Ok(OnError::Ignore),
        Some("enospc") if name == "werror" => Ok(OnError::Enospc),
        Some("stop") => Ok(OnError::Stop),
        Some(word) => Err(QmpError::generic(format!(
            "Parameter '{name}' does not accept value '{word}'"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{decode, find};
    use super::*;
    use crate::json::Reader;
    use ipc::objects::Scalar;

    fn add(text: &str) -> Result<NewBlockdev, String> {
        let Value::Object(arguments) = Reader::default().next(&mut text.as_bytes()).unwrap().unwrap() else {
            panic!("{text}")
        };
        match decode(find("blockdev-add").unwrap(), arguments) {
            Ok(Command::BlockdevAdd(new)) => Ok(new),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.desc),
        }
    }

    #[test]
    fn a_node_is_flat_when_it_leaves() {
        let new = add(
            "{'driver': 'qcow2', 'node-name': 'n', 'backing': null, 'file': {'driver': 'file', 'filename': 'a'},
              'cache': {'direct': true}}",
        )
        .unwrap();
        assert_eq!(new.backend, None);
        for (name, value) in [
            ("driver", Scalar::Text("qcow2".into())),
            ("backing", Scalar::Null),
            ("file.filename", Scalar::Text("a".into())),
            ("cache.direct", Scalar::Bool(true)),
        ] {
            assert!(new.options.0.contains(&(name.to_owned(), value)), "{name}");
        }
    }

    #[test]
    fn the_old_form_makes_a_drive() {
        let new = add(
            "{'options': {'driver': 'qcow2', 'id': 'd', 'aio': 'native', 'rerror': 'stop', 'werror': 'ignore',
              'cache': {'writeback': false, 'direct': true}, 'discard': 'unmap',
              'file': {'driver': 'file', 'filename': 'a'},
              'backing': {'driver': 'raw', 'file': {'driver': 'file', 'filename': 'b'}}}}",
        )
        .unwrap();
        let backend = new.backend.unwrap();
        assert_eq!(
            (
                backend.id.as_str(),
                backend.write_cache,
                backend.read_error,
                backend.write_error
            ),
            ("d", false, OnError::Stop, OnError::Ignore)
        );
        let has = |name: &str| new.options.0.iter().any(|(known, _)| known == name);
        assert!(has("file.aio") && !has("backing.file.aio") && !has("aio") && has("cache.direct"));
    }

    #[test]
    fn faults_have_the_texts_of_a_live_server() {
        for (text, expected) in [
            ("{}", "Parameter 'driver' is missing"),
            ("{'options': {'driver': 'qcow2'}}", "Parameter 'driver' is missing"),
            (
                "{'driver': 'nope', 'node-name': 'n'}",
                "Parameter 'driver' does not accept value 'nope'",
            ),
            ("{'driver': 'qcow2', 'node-name': 'n'}", "Parameter 'file' is missing"),
            (
                "{'driver': 'raw', 'id': 'x', 'file': 'f'}",
                "Parameter 'id' is unexpected",
            ),
            (
                "{'driver': 'raw', 'file': 'f', 'cache': {'writeback': true}}",
                "Parameter 'cache.writeback' is unexpected",
            ),
            (
                "{'driver': 'raw', 'file': 'f', 'discard': 'bogus'}",
                "Parameter 'discard' does not accept value 'bogus'",
            ),
            (
                "{'driver': 'qcow2', 'file': 'f', 'cache-size': 'x'}",
                "Invalid parameter type for 'cache-size', expected: integer",
            ),
            (
                "{'options': {'id': 'd', 'driver': 'raw', 'file': 'f', 'werror': 'often'}}",
                "Parameter 'werror' does not accept value 'often'",
            ),
        ] {
            assert_eq!(add(text).unwrap_err(), expected, "{text}");
        }
    }
}
