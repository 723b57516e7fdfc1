//! `if=` and `media=` of `-drive`: which device the drive brings along.

use super::draft::Draft;
use super::error::UsageError;
use super::given::Given;
use super::keyval::Pairs;
use ipc::device::NewDevice;

/// Where a drive is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interface {
    /// Nowhere: a `-device` uses it, or nobody.
    None,
    /// virtio-blk-pci.
    Virtio,
    /// ide-hd, or ide-cd; only with `-accel qtest`.
    Ide {
        /// `media=cdrom`.
        is_cd: bool,
    },
    /// floppy; only with `-accel qtest`.
    Floppy,
}

const VIRTIO_ONLY: &str =
    "Bulkhead's disks are virtio disks: if=virtio, or if=none with -device virtio-blk-pci,drive=ID";

impl Interface {
    /// What a drive's line says.
    pub(super) fn read(draft: &mut Draft, line: &Given, pairs: &Pairs) -> Result<Self, UsageError> {
        let is_cd = match pairs.get("media").map(|media| (media, media.value.to_str())) {
            None | Some((_, Some("disk"))) => false,
            Some((media, Some("cdrom"))) => {
                draft.needs_qtest(media, "Bulkhead has no CD-ROM drive: only media=disk is possible");
                true
            }
            Some((media, _)) => return Err(media.refuse("media is disk, and with -accel qtest also cdrom")),
        };
        let Some(interface) = pairs.get("if") else {
            // Where no guest is, no device is missed.
            draft.drive_without_interface.get_or_insert_with(|| line.clone());
            return Ok(Self::None);
        };
        Ok(match interface.value.to_str() {
            Some("virtio") => Self::Virtio,
            Some("none") => Self::None,
            Some("ide") => {
                draft.needs_qtest(interface, VIRTIO_ONLY);
                Self::Ide { is_cd }
            }
            Some("floppy") => {
                draft.needs_qtest(interface, VIRTIO_ONLY);
                Self::Floppy
            }
            _ => return Err(interface.refuse(VIRTIO_ONLY)),
        })
    }

    /// Whether what is in it is only read.
    pub(super) fn is_cd(self) -> bool {
        self == Self::Ide { is_cd: true }
    }

    /// The id of a drive that has none, as QEMU numbers them.
    pub(super) fn next_id(self, draft: &Draft) -> String {
        let brought = |prefix: &str| {
            let ids = draft
                .brought_along
                .iter()
                .filter(|device| device.driver.starts_with(prefix));
            ids.count()
        };
        match self {
            Self::None | Self::Virtio => {
                let is_virtio = self == Self::Virtio;
                let before = draft.drive_has_device.iter().filter(|other| **other == is_virtio);
                format!("{}{}", if is_virtio { "virtio" } else { "none" }, before.count())
            }
            Self::Ide { is_cd } => {
                // Two on a bus.
                let (place, kind) = (brought("ide-"), if is_cd { "cd" } else { "hd" });
                format!("ide{}-{kind}{}", place / 2, place % 2)
            }
            Self::Floppy => format!("floppy{}", brought("floppy")),
        }
    }

    /// The device of a drive, where it is not virtio-blk, which comes with the drive itself.
    pub(super) fn bring_device(self, draft: &mut Draft, drive: &str) {
        let driver = match self {
            Self::None | Self::Virtio => return,
            Self::Ide { is_cd: true } => "ide-cd",
            Self::Ide { is_cd: false } => "ide-hd",
            Self::Floppy => "floppy",
        };
        draft.brought_along.push(NewDevice {
            driver: driver.to_owned(),
            drive: Some(drive.to_owned()),
            ..NewDevice::default()
        });
    }
}
