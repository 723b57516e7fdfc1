//! Character devices: commands' arguments and results.

use super::types::{
    EMPTY, EnumType, INT, IntType, StructType, Type, Variants, enumeration, optional, required, structure,
};

pub(super) static ADD: StructType = structure(
    "q_obj_chardev-add-arg",
    &[required("id", Type::Str), required("backend", Type::Struct(&BACKEND))],
);
pub(super) static CHANGE: StructType = structure(
    "q_obj_chardev-change-arg",
    &[required("id", Type::Str), required("backend", Type::Struct(&BACKEND))],
);
static BACKEND: StructType = StructType {
    name: "ChardevBackend",
    members: &[required("type", Type::Enum(&BACKEND_KIND))],
    variants: Some(&Variants {
        tag: "type",
        of: &[
            ("file", &FILE_WRAPPER),
            ("pipe", &PIPE_WRAPPER),
            ("socket", &SOCKET_WRAPPER),
            ("udp", &UDP_WRAPPER),
            ("pty", &PLAIN_WRAPPER),
            ("null", &PLAIN_WRAPPER),
            ("stdio", &STDIO_WRAPPER),
            ("ringbuf", &RINGBUF_WRAPPER),
        ],
    }),
};
static BACKEND_KIND: EnumType = enumeration("ChardevBackendKind", ipc::chardev::BACKENDS);
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
static SOCKET_WRAPPER: StructType = structure("ChardevSocketWrapper", &[required("data", Type::Struct(&SOCKET))]);
static SOCKET: StructType = structure(
    "ChardevSocket",
    &[
        required("addr", Type::Struct(&ADDRESS)),
        optional("server", Type::Bool),
        optional("wait", Type::Bool),
        optional("nodelay", Type::Bool),
        optional("telnet", Type::Bool),
        optional("reconnect", INT),
        optional("reconnect-ms", INT),
    ],
);
static UDP_WRAPPER: StructType = structure("ChardevUdpWrapper", &[required("data", Type::Struct(&UDP))]);
static UDP: StructType = structure(
    "ChardevUdp",
    &[
        required("remote", Type::Struct(&ADDRESS)),
        optional("local", Type::Struct(&ADDRESS)),
    ],
);
static STDIO_WRAPPER: StructType = structure("ChardevStdioWrapper", &[required("data", Type::Struct(&STDIO))]);
static STDIO: StructType = structure("ChardevStdio", &[optional("signal", Type::Bool)]);
static RINGBUF_WRAPPER: StructType = structure("ChardevRingbufWrapper", &[required("data", Type::Struct(&RINGBUF))]);
static RINGBUF: StructType = structure("ChardevRingbuf", &[optional("size", INT)]);

/// An address whose own members stand beside its type.
pub(super) static SOCKET_ADDRESS: StructType = StructType {
    name: "SocketAddress",
    members: &[required("type", Type::Enum(&ADDRESS_TYPE))],
    variants: Some(&Variants {
        tag: "type",
        of: &[("inet", &INET), ("unix", &UNIX), ("fd", &FD)],
    }),
};
pub(super) static ADDRESS: StructType = StructType {
    name: "SocketAddressLegacy",
    members: &[required("type", Type::Enum(&ADDRESS_TYPE))],
    variants: Some(&Variants {
        tag: "type",
        of: &[("inet", &INET_WRAPPER), ("unix", &UNIX_WRAPPER), ("fd", &FD_WRAPPER)],
    }),
};
static ADDRESS_TYPE: EnumType = enumeration("SocketAddressType", &["inet", "unix", "fd"]);
static INET_WRAPPER: StructType = structure("InetSocketAddressWrapper", &[required("data", Type::Struct(&INET))]);
static INET: StructType = structure(
    "InetSocketAddress",
    &[
        required("host", Type::Str),
        required("port", Type::Str),
        optional("numeric", Type::Bool),
        optional("to", Type::Int(PORT)),
        optional("ipv4", Type::Bool),
        optional("ipv6", Type::Bool),
        optional("keep-alive", Type::Bool),
    ],
);
const PORT: IntType = IntType::Narrow {
    name: "uint16_t",
    min: 0,
    max: 65535,
};
static UNIX_WRAPPER: StructType = structure("UnixSocketAddressWrapper", &[required("data", Type::Struct(&UNIX))]);
static UNIX: StructType = structure("UnixSocketAddress", &[required("path", Type::Str)]);
static FD_WRAPPER: StructType = structure("FdSocketAddressWrapper", &[required("data", Type::Struct(&FD))]);
static FD: StructType = structure("FdSocketAddress", &[required("str", Type::Str)]);

/// What chardev-add and chardev-change return.
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
