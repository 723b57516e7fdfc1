//! The guest's first file system: busybox, the drivers that a virtual machine needs, the scripts of `tests/lab/guest`.

use super::cpio::Archive;
use super::pieces::{Kernel, busybox, tests_folder};
use std::fs;

/// What the guest's kernel loads, with what these depend on; ext4 and the serial port are built in or come the same way.
const MODULES: [&str; 9] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_rng",
    "ext4",
    "button",
    "evdev",
    "pvpanic_mmio",
    "pvpanic_pci",
    "qemu_fw_cfg",
];

/// The archive for `-initrd`.
pub fn initramfs(kernel: &Kernel) -> Result<Vec<u8>, String> {
    let mut archive = Archive::new();
    let folder = tests_folder().join("lab/guest");
    archive.file("init", 0o755, &read(&folder.join("init"))?);
    archive.file("bin/busybox", 0o755, &busybox()?);
    add_modules(&mut archive, kernel, &MODULES)?;
    let scripts = fs::read_dir(folder.join("bin")).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut scripts: Vec<_> = scripts.flatten().map(|entry| entry.path()).collect();
    scripts.sort();
    for script in scripts {
        let name = script
            .file_name()
            .expect("read_dir gives names")
            .to_string_lossy()
            .into_owned();
        archive.file(&format!("bin/{name}"), 0o755, &read(&script)?);
    }
    for folder in ["dev", "proc", "sys", "mnt", "tmp"] {
        archive.directory(folder, 0o755);
    }
    Ok(archive.finish())
}

/// Adds modules under /modules, and /modules.order: their paths in an order in which they load.
pub(super) fn add_modules(archive: &mut Archive, kernel: &Kernel, wanted: &[&str]) -> Result<(), String> {
    let mut order = String::new();
    for module in kernel.modules(wanted)? {
        let path = format!("/modules/{}.ko", module.name);
        archive.file(&path, 0o644, &module.content);
        order.push_str(&path);
        order.push('\n');
    }
    archive.file("modules.order", 0o644, order.as_bytes());
    Ok(())
}

pub(super) fn read(path: &std::path::Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}
