//! Writes a `newc` cpio archive: what the kernel unpacks as its first file system.
//!
//! Format: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's sources. Everything belongs to
//! root and carries no time, so that the same content gives the same bytes.

use std::collections::BTreeSet;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// An archive that is being put together. Parent directories come by themselves.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// A file; `mode` is its permission bits, including setuid.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> &mut Self {
        let path = path.trim_start_matches('/');
        self.parents(path);
        self.entry(path, FILE | mode, content);
        self
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        let path = path.trim_start_matches('/');
        self.parents(path);
        self.entry(path, SYMLINK | 0o777, target.as_bytes());
        self
    }

    /// A directory.
    pub fn directory(&mut self, path: &str, mode: u32) -> &mut Self {
        let path = path.trim_matches('/');
        self.parents(path);
        if self.directories.insert(path.to_owned()) {
            self.entry(path, DIRECTORY | mode, &[]);
        }
        self
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent, 0o755);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("newc holds files below 4 GiB");
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        // inode, mode, uid, gid, links, time, size, device (2), rdev (2), length of the name with its NUL, checksum.
        let name_size = path.len() as u32 + 1;
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    /// Names and contents end on a multiple of four bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn an_archive_has_the_kernel_s_layout() {
        let mut archive = Archive::new();
        archive.file("/a/b", 0o755, b"hello");
        let bytes = archive.finish();

        assert_eq!(bytes.len() % 4, 0);
        // The directory comes first: header of 110 bytes, "a\0", aligned.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000041ED");
        assert_eq!(&bytes[110..112], b"a\0");
        // Then the file with its mode and its size.
        assert_eq!(&bytes[112..118], b"070701");
        assert_eq!(&bytes[126..134], b"000081ED");
        assert_eq!(&bytes[166..174], b"00000005");
        assert!(bytes.windows(5).any(|window| window == b"hello"));
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
