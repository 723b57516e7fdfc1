//! Character devices: commands' arguments and results.

use super::types::{EMPTY, EnumType, INT, StructType, Type, Variants, enumeration, optional, required, structure};

pub(super) static ADD: StructType = structure(
    "q_obj_chardev-add-arg",
    &[required("id", Type::Str), required("backend", Type::Struct(&BACKEND))],
);
static BACKEND: StructType = StructType {
    name: "ChardevBackend",
    members: &[required("type", Type::Enum(&BACKEND_KIND))],
    variants: Some(&Variants {
        tag: "type",
        of: &[
            ("null", &PLAIN_WRAPPER),
            ("file", &FILE_WRAPPER),
            ("pipe", &PIPE_WRAPPER),
            ("pty", &PLAIN_WRAPPER),
            ("ringbuf", &RINGBUF_WRAPPER),
        ],
    }),
};
static BACKEND_KIND: EnumType = enumeration("ChardevBackendKind", &["null", "file", "pipe", "pty", "ringbuf"]);
static PLAIN_WRAPPER: StructType = structure("ChardevCommonWrapper", &[required("data", Type::Struct(&EMPTY))]);
static FILE_WRAPPER: StructType = structure("ChardevFileWrapper", &[required("data", Type::Struct(&FILE))]);
static FILE: StructType = structure(
    "ChardevFile",
    &[
        optional("in", Type::Str),
        required("out", Type::Str),
        optional("append", Type::Bool),
    ],
);
static PIPE_WRAPPER: StructType = structure("ChardevHostdevWrapper", &[required("data", Type::Struct(&PIPE))]);
static PIPE: StructType = structure("ChardevHostdev", &[required("device", Type::Str)]);
static RINGBUF_WRAPPER: StructType = structure("ChardevRingbufWrapper", &[required("data", Type::Struct(&RINGBUF))]);
static RINGBUF: StructType = structure("ChardevRingbuf", &[optional("size", INT)]);

/// What chardev-add returns.
pub(super) static ADDED: StructType = structure("ChardevReturn", &[optional("pty", Type::Str)]);
pub(super) static REMOVE: StructType = structure("q_obj_chardev-remove-arg", &[required("id", Type::Str)]);
/// An item of query-chardev.
pub(super) static INFO: StructType = structure(
    "ChardevInfo",
    &[
        required("label", Type::Str),
        required("filename", Type::Str),
        required("frontend-open", Type::Bool),
    ],
);
/// An item of query-chardev-backends.
pub(super) static BACKEND_INFO: StructType = structure("ChardevBackendInfo", &[required("name", Type::Str)]);

pub(super) static RINGBUF_WRITE: StructType = structure(
    "q_obj_ringbuf-write-arg",
    &[
        required("device", Type::Str),
        required("data", Type::Str),
        optional("format", Type::Enum(&DATA_FORMAT)),
    ],
);
pub(super) static RINGBUF_READ: StructType = structure(
    "q_obj_ringbuf-read-arg",
    &[
        required("device", Type::Str),
        required("size", INT),
        optional("format", Type::Enum(&DATA_FORMAT)),
    ],
);
static DATA_FORMAT: EnumType = enumeration("DataFormat", &["utf8", "base64"]);
