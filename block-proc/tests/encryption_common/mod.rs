//! For the tests of encrypted images: images by qemu-img and by cryptsetup, and nodes over them.
#![allow(dead_code, reason = "every test file uses another part")]

use crate::qcow2_common::*;
use block_proc::buffer::Segments;
use block_proc::node::luks::{self, LuksNode};
use block_proc::node::qcow2::{OpenError, Options, Qcow2Node};
use block_proc::node::{Node, NodeFuture};
use ipc::secret::Secret;
use std::path::Path;
use std::rc::Rc;

pub const PASSWORD: &str = "hunter2";
/// Few iterations of PBKDF2: what is tested is not how long it takes.
pub const QUICK: &str = "iter-time=10";

pub fn secret(password: &str) -> Option<Secret> {
    Some(Secret::new(password.as_bytes().to_vec()).unwrap())
}

/// qemu-img with the password as secret `s`.
pub fn qemu_img_encrypted(arguments: &[&str]) {
    let secret = format!("secret,id=s,data={PASSWORD}");
    let arguments = [&arguments[..1], &["--object", &secret], &arguments[1..]].concat();
    for attempt in 0.. {
        let output = tool("qemu-img", &arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return;
        }
        // It measures the speed of PBKDF2 by a clock that is sometimes too coarse for it.
        let is_clock = said.contains("Unable to get accurate CPU usage");
        assert!(is_clock && attempt < 50, "qemu-img {arguments:?}: {said}");
    }
}

/// A file's description for `--image-opts`.
pub fn described(format: &str, file: &Path) -> String {
    let key = match format {
        "luks" => ",key-secret=s",
        "qcow2" => ",encrypt.key-secret=s",
        _ => "",
    };
    format!("driver={format},file.driver=file,file.filename={}{key}", file.display())
}

/// Writes raw bytes into a new encrypted image and returns its bytes. `options`: as for `qemu-img -o`, without the key.
pub fn encrypted(folder: &Path, format: &str, options: &str, raw: &[u8]) -> Vec<u8> {
    let (plain, image) = (folder.join("plain"), folder.join("encrypted"));
    std::fs::write(&plain, raw).unwrap();
    let key = if format == "luks" {
        "key-secret=s"
    } else {
        "encrypt.key-secret=s"
    };
    let options = format!("{options},{key}");
    qemu_img_encrypted(&[
        "convert",
        "-f",
        "raw",
        "-O",
        format,
        "-o",
        &options,
        plain.to_str().unwrap(),
        image.to_str().unwrap(),
    ]);
    std::fs::read(&image).unwrap()
}

/// QEMU decrypts the image to the same bytes, and (for qcow2) finds nothing to repair.
pub fn assert_same_for_qemu(folder: &Path, format: &str, image: &[u8], raw: &[u8]) {
    let (plain, path) = (folder.join("expected"), folder.join("image"));
    std::fs::write(&plain, raw).unwrap();
    std::fs::write(&path, image).unwrap();
    let (image, plain) = (described(format, &path), described("raw", &plain));
    qemu_img_encrypted(&["compare", "--image-opts", &image, &plain]);
    if format == "qcow2" {
        qemu_img_encrypted(&["check", "--image-opts", &image]);
    }
}

pub fn luks_options(child: &Memory, password: &str) -> luks::Options {
    luks::Options {
        file_bytes: child.bytes.borrow().len() as u64,
        align: 1,
        key: secret(password),
    }
}

pub fn open_luks(child: &Rc<Memory>, password: &str) -> Result<Rc<LuksNode>, luks::OpenError> {
    block_on(LuksNode::open(child.clone(), luks_options(child, password)))
}

pub fn open_encrypted(
    child: &Rc<Memory>,
    password: &str,
    backing: Option<Rc<dyn Node>>,
) -> Result<Rc<Qcow2Node>, OpenError> {
    let options = Options {
        key: secret(password),
        ..options(child)
    };
    open_with(child, options, backing)
}

/// A node of either kind, and its size.
pub fn open_any(child: &Rc<Memory>, format: &str, backing: Option<Rc<dyn Node>>) -> (Rc<dyn Node>, u64) {
    if format == "luks" {
        let node = open_luks(child, PASSWORD).unwrap();
        let bytes = node.bytes();
        return (node, bytes);
    }
    let node = open_encrypted(child, PASSWORD, backing).unwrap();
    let bytes = node.bytes();
    (node, bytes)
}

/// All that a guest would read.
pub fn all(node: &Rc<dyn Node>, bytes: u64) -> Vec<u8> {
    let node = node.clone();
    block_on(async move {
        let mut all = Vec::new();
        while (all.len() as u64) < bytes {
            let step = (bytes - all.len() as u64).min(1 << 20) as usize;
            all.extend(read(&*node, all.len() as u64, step).await.expect("a read"));
        }
        all
    })
}

/// Bytes that no two sectors share.
pub fn random_bytes(bytes: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..bytes).map(|_| random.next() as u8).collect()
}

/// Passes everything on and remembers what was written: for tests of what reaches a file.
pub struct Watched {
    pub child: Rc<Memory>,
    pub written: std::cell::RefCell<Vec<u8>>,
}

impl Node for Watched {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        self.child.read(offset, into)
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        let mut data = vec![0; from.bytes() as usize];
        from.read_into(&mut data);
        self.written.borrow_mut().extend(data);
        self.child.write(offset, from, durable)
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        self.child.write_zeroes(offset, bytes, may_unmap)
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        self.child.discard(offset, bytes)
    }

    fn flush(&self) -> NodeFuture<'_> {
        self.child.flush()
    }

    fn bytes(&self) -> u64 {
        self.child.bytes()
    }
}
