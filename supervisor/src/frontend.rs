//! The devices of `-accel qtest`: users of drives and nodes without a guest's side.
//!
//! Where no guest is, nobody rings a device's queues; what is left of a device is what a client sees of it: its name, the
//! drive or node that it uses and keeps others off, whether it only reads, and the tray of one whose medium can be changed.
//! block-proc does not know of them. docs/QTEST.md says what they have and what they lack.

/// A type of devices.
#[derive(Debug, PartialEq, Eq)]
pub struct FrontendType {
    /// `driver`.
    pub name: &'static str,
    /// Another name for it.
    pub alias: Option<&'static str>,
    /// For `-device help`.
    pub description: &'static str,
    /// Where it goes.
    pub bus: Bus,
    /// What it is.
    pub role: Role,
    /// Its properties beside `driver`, `id` and `bus`.
    pub properties: &'static [&'static str],
}

/// Kinds of buses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// The machine's own.
    Pci,
    /// That of a controller that was added.
    Scsi,
    /// The machine's own.
    Ide,
    /// The machine's own.
    Floppy,
}

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Disks go on it.
    Controller,
    /// A disk that is there or not.
    Disk,
    /// A drive whose medium is changed.
    Removable {
        /// It has a tray, which moves for that.
        tray: bool,
        /// Its media are only read.
        read_only: bool,
    },
}

impl Bus {
    /// QMP's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pci => "PCI",
            Self::Scsi => "SCSI",
            Self::Ide => "IDE",
            Self::Floppy => "floppy-bus",
        }
    }

    /// Whether it is the machine's bus of this name. Those of controllers have the controllers' names.
    pub fn is_named(self, name: &str) -> bool {
        match self {
            Self::Pci => matches!(name, "pcie.0" | "pci.0"),
            Self::Ide => matches!(name.strip_prefix("ide."), Some("0" | "1" | "2" | "3" | "4" | "5")),
            Self::Floppy => name == "floppy-bus.0",
            Self::Scsi => false,
        }
    }
}

const SCSI_PROPERTIES: &[&str] = &[
    "bootindex",
    "channel",
    "drive",
    "lun",
    "rerror",
    "scsi-id",
    "serial",
    "share-rw",
    "werror",
    "write-cache",
];
const IDE_PROPERTIES: &[&str] = &[
    "bootindex",
    "drive",
    "rerror",
    "serial",
    "share-rw",
    "unit",
    "werror",
    "write-cache",
];

const CD: Role = Role::Removable {
    tray: true,
    read_only: true,
};

/// All types.
pub static FRONTEND_TYPES: &[FrontendType] = &[
    FrontendType {
        name: "virtio-blk-pci",
        alias: Some("virtio-blk"),
        description: "a disk",
        bus: Bus::Pci,
        role: Role::Disk,
        properties: &[
            "addr",
            "bootindex",
            "drive",
            "iothread",
            "num-queues",
            "queue-size",
            "rerror",
            "serial",
            "share-rw",
            "werror",
            "write-cache",
        ],
    },
    FrontendType {
        name: "virtio-scsi-pci",
        alias: Some("virtio-scsi"),
        description: "a controller for scsi-hd and scsi-cd",
        bus: Bus::Pci,
        role: Role::Controller,
        properties: &["addr", "iothread", "num-queues"],
    },
    FrontendType {
        name: "scsi-hd",
        alias: None,
        description: "a disk",
        bus: Bus::Scsi,
        role: Role::Disk,
        properties: SCSI_PROPERTIES,
    },
    FrontendType {
        name: "scsi-cd",
        alias: None,
        description: "a CD-ROM drive",
        bus: Bus::Scsi,
        role: CD,
        properties: SCSI_PROPERTIES,
    },
    FrontendType {
        name: "ide-hd",
        alias: None,
        description: "a disk",
        bus: Bus::Ide,
        role: Role::Disk,
        properties: IDE_PROPERTIES,
    },
    FrontendType {
        name: "ide-cd",
        alias: None,
        description: "a CD-ROM drive",
        bus: Bus::Ide,
        role: CD,
        properties: IDE_PROPERTIES,
    },
    FrontendType {
        name: "floppy",
        alias: None,
        description: "a floppy disk drive",
        bus: Bus::Floppy,
        role: Role::Removable {
            tray: false,
            read_only: false,
        },
        properties: &["drive", "share-rw", "unit", "write-cache"],
    },
];

/// The type of this name or alias.
pub fn find(name: &str) -> Option<&'static FrontendType> {
    FRONTEND_TYPES
        .iter()
        .find(|ty| ty.name == name || ty.alias == Some(name))
}

impl FrontendType {
    /// Whether its medium can be changed.
    pub fn is_removable(&self) -> bool {
        matches!(self.role, Role::Removable { .. })
    }

    /// Whether it has a tray.
    pub fn has_tray(&self) -> bool {
        matches!(self.role, Role::Removable { tray: true, .. })
    }

    /// The type that errors about properties of the disk name: of a virtio device, the one inside.
    pub fn disk_type(&self) -> &'static str {
        match self.name {
            "virtio-blk-pci" => "virtio-blk-device",
            name => name,
        }
    }

    /// What is below it in the object tree and has its drive.
    pub fn inner(&self) -> Option<&'static str> {
        (self.name == "virtio-blk-pci").then_some("virtio-backend")
    }
}

/// A device that uses a drive or a node, or could.
#[derive(Debug, Clone)]
pub struct Frontend {
    /// Its type.
    pub ty: &'static FrontendType,
    /// `id=`.
    pub id: Option<String>,
    /// Where it is in the object tree.
    pub path: String,
    /// The path of the controller that it is on.
    pub controller: Option<String>,
    /// `drive=`, for the object tree.
    pub drive: String,
    /// `iothread=`.
    pub io_thread: Option<String>,
    /// Others may write as well.
    pub shares_writing: bool,
    /// Its tray is open.
    pub is_tray_open: bool,
}

impl Frontend {
    /// The object that has the drive: what query-block calls `qdev`.
    pub fn disk_path(&self) -> String {
        match self.ty.inner() {
            Some(inner) => format!("{}/{inner}", self.path),
            None => self.path.clone(),
        }
    }

    /// What query-block and errors call it: its id, or where it is.
    pub fn name(&self) -> String {
        self.id.clone().unwrap_or_else(|| self.path.clone())
    }

    /// Whether it has a state of its I/O: a floppy has none.
    pub fn reports_errors(&self) -> bool {
        self.ty.bus != Bus::Floppy
    }

    /// Whether an id or a path means it.
    pub fn is_called(&self, name: &str) -> bool {
        self.id.as_deref() == Some(name) || self.path == name || self.disk_path() == name
    }
}
