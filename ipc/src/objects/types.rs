//! The types of objects that can be created, as data.

/// What a property of a new object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A boolean; on or off on the command line.
    Bool,
    /// An integer.
    Int,
    /// A size in bytes; with a suffix on the command line.
    Size,
    /// Text.
    Text,
    /// One of these words.
    Word(&'static [&'static str]),
    /// A struct of integers with these names.
    Ints(&'static [&'static str]),
}

impl Kind {
    /// What qom-list calls it.
    pub fn type_name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::Int | Self::Size => "int",
            Self::Text => "string",
            Self::Word(_) => "QCryptoSecretFormat",
            Self::Ints(_) => "ThrottleLimits",
        }
    }
}

/// A property of a new object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Property {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Whether it must be given.
    pub required: bool,
}

/// A type of objects.
#[derive(Debug, PartialEq, Eq)]
pub struct ObjectType {
    /// `qom-type`.
    pub name: &'static str,
    /// The type that it is derived from.
    pub parent: &'static str,
    /// Its properties.
    pub properties: &'static [Property],
}

const fn optional(name: &'static str, kind: Kind) -> Property {
    Property {
        name,
        kind,
        required: false,
    }
}

const fn required(name: &'static str, kind: Kind) -> Property {
    Property {
        name,
        kind,
        required: true,
    }
}

/// The formats of a secret.
pub const SECRET_FORMATS: &[&str] = &["raw", "base64"];

/// The members of `limits`, in the order of QMP's ThrottleLimits.
pub const THROTTLE_LIMITS: &[&str] = &[
    "iops-total",
    "iops-total-max",
    "iops-total-max-length",
    "iops-read",
    "iops-read-max",
    "iops-read-max-length",
    "iops-write",
    "iops-write-max",
    "iops-write-max-length",
    "bps-total",
    "bps-total-max",
    "bps-total-max-length",
    "bps-read",
    "bps-read-max",
    "bps-read-max-length",
    "bps-write",
    "bps-write-max",
    "bps-write-max-length",
    "iops-size",
];

/// All types, in the order of their names.
pub static OBJECT_TYPES: &[ObjectType] = &[
    ObjectType {
        name: "iothread",
        parent: "event-loop-base",
        properties: &[
            optional("aio-max-batch", Kind::Int),
            optional("poll-max-ns", Kind::Int),
            optional("poll-grow", Kind::Int),
            optional("poll-shrink", Kind::Int),
        ],
    },
    ObjectType {
        name: "memory-backend-memfd",
        parent: "memory-backend",
        properties: &[
            optional("prealloc", Kind::Bool),
            optional("share", Kind::Bool),
            required("size", Kind::Size),
            optional("seal", Kind::Bool),
        ],
    },
    ObjectType {
        name: "rng-builtin",
        parent: "rng-backend",
        properties: &[],
    },
    ObjectType {
        name: "rng-random",
        parent: "rng-backend",
        properties: &[optional("filename", Kind::Text)],
    },
    ObjectType {
        name: "secret",
        parent: "secret_common",
        properties: &[
            optional("format", Kind::Word(SECRET_FORMATS)),
            optional("data", Kind::Text),
            optional("file", Kind::Text),
        ],
    },
    ObjectType {
        name: "throttle-group",
        parent: "object",
        properties: &[
            optional("limits", Kind::Ints(THROTTLE_LIMITS)),
            optional("x-iops-total", Kind::Int),
            optional("x-iops-total-max", Kind::Int),
            optional("x-iops-total-max-length", Kind::Int),
            optional("x-iops-read", Kind::Int),
            optional("x-iops-read-max", Kind::Int),
            optional("x-iops-read-max-length", Kind::Int),
            optional("x-iops-write", Kind::Int),
            optional("x-iops-write-max", Kind::Int),
            optional("x-iops-write-max-length", Kind::Int),
            optional("x-bps-total", Kind::Int),
            optional("x-bps-total-max", Kind::Int),
            optional("x-bps-total-max-length", Kind::Int),
            optional("x-bps-read", Kind::Int),
            optional("x-bps-read-max", Kind::Int),
            optional("x-bps-read-max-length", Kind::Int),
            optional("x-bps-write", Kind::Int),
            optional("x-bps-write-max", Kind::Int),
            optional("x-bps-write-max-length", Kind::Int),
            optional("x-iops-size", Kind::Int),
        ],
    },
];

/// The type of this name.
pub fn find(name: &str) -> Option<&'static ObjectType> {
    OBJECT_TYPES.iter().find(|ty| ty.name == name)
}

impl ObjectType {
    /// Its property of this name.
    pub fn property(&self, name: &str) -> Option<&'static Property> {
        self.properties.iter().find(|property| property.name == name)
    }
}
