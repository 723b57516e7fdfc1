//! Drives and nodes: what lines say of them.

use super::machine;
use crate::config::{Drive, Model};
use crate::graph::options::{Aio, ChildOptions, DetectZeroes, DriverOptions, FileOptions, NodeOptions};
use ipc::block::ImageFormat;
use ipc::blockdev::BackendOptions;
use ipc::graph::OnError;

/// A raw drive with nothing said about it.
pub(super) fn disk(id: &str, file: &str) -> Drive {
    let file = FileOptions {
        is_device: false,
        path: file.into(),
        engine: None,
        locking: true,
    };
    Drive {
        throttle: None,
        backend: BackendOptions {
            id: id.into(),
            write_cache: true,
            read_error: OnError::Report,
            write_error: OnError::Enospc,
        },
        node: NodeOptions::image(ImageFormat::Raw, file),
        serial: String::new(),
        queues: None,
    }
}

/// The file of a raw drive.
pub(super) fn file_of(drive: &mut Drive) -> &mut FileOptions {
    let DriverOptions::Raw {
        file: ChildOptions::Inline(file),
        ..
    } = &mut drive.node.driver
    else {
        panic!("not raw")
    };
    match &mut file.driver {
        DriverOptions::File(file) => file,
        other => panic!("{other:?}"),
    }
}

#[test]
fn drives_in_all_forms() {
    type Change = fn(&mut Drive);
    let cases: &[(&str, Change)] = &[
        ("", |_| {}),
        ("media=disk,snapshot=off,werror=enospc,rerror=report", |_| {}),
        ("werror=stop,rerror=ignore", |drive| {
            drive.backend.write_error = OnError::Stop;
            drive.backend.read_error = OnError::Ignore;
        }),
        ("id=root", |drive| drive.backend.id = "root".into()),
        ("readonly=on", |drive| drive.node.common.read_only = Some(true)),
        ("readonly", |drive| drive.node.common.read_only = Some(true)),
        ("read-only=on", |drive| drive.node.common.read_only = Some(true)),
        ("readonly=off", |drive| drive.node.common.read_only = Some(false)),
        ("auto-read-only=on", |drive| {
            drive.node.common.auto_read_only = Some(true)
        }),
        ("cache=writeback", |_| {}),
        ("cache=none", |drive| drive.node.common.direct = Some(true)),
        ("cache=writethrough", |drive| drive.backend.write_cache = false),
        ("cache=directsync", |drive| {
            drive.backend.write_cache = false;
            drive.node.common.direct = Some(true);
        }),
        ("cache=unsafe", |drive| drive.node.common.no_flush = Some(true)),
        ("cache.direct=on", |drive| drive.node.common.direct = Some(true)),
        ("cache=none,cache.direct=off", |_| {}),
        ("cache.writeback=off,cache.no-flush=on", |drive| {
            drive.backend.write_cache = false;
            drive.node.common.no_flush = Some(true);
        }),
        ("aio=threads", |drive| file_of(drive).engine = Some(Aio::Threads)),
        ("aio=io_uring", |drive| file_of(drive).engine = Some(Aio::IoUring)),
        ("aio=native,cache.direct=on", |drive| {
            file_of(drive).engine = Some(Aio::Native);
            drive.node.common.direct = Some(true);
        }),
        ("discard=unmap", |drive| drive.node.common.discard = Some(true)),
        ("discard=on", |drive| drive.node.common.discard = Some(true)),
        ("discard=ignore", |drive| drive.node.common.discard = Some(false)),
        ("discard=off", |drive| drive.node.common.discard = Some(false)),
        ("detect-zeroes=on", |drive| {
            drive.node.common.detect_zeroes = DetectZeroes::On
        }),
        ("node-name=n", |drive| drive.node.name = Some("n".into())),
        ("file.locking=off", |drive| file_of(drive).locking = false),
        ("offset=1M,size=512", |drive| {
            let DriverOptions::Raw { offset, bytes, .. } = &mut drive.node.driver else {
                panic!()
            };
            (*offset, *bytes) = (1 << 20, Some(512));
        }),
        ("serial=12345678901234567890", |drive| {
            drive.serial = "12345678901234567890".into()
        }),
        ("num-queues=32", |drive| drive.queues = Some(32)),
        ("file=/b", |drive| file_of(drive).path = "/b".into()),
        ("file=a,,b", |drive| file_of(drive).path = "a,b".into()),
        ("file=file:a:b", |drive| file_of(drive).path = "a:b".into()),
        ("file=./a:b", |drive| file_of(drive).path = "./a:b".into()),
        ("file=/dev/fdset/1", |drive| file_of(drive).path = "/dev/fdset/1".into()),
        ("copy-on-read=on", |drive| {
            let node = drive.node.clone();
            drive.node.driver = DriverOptions::CopyOnRead {
                file: ChildOptions::Inline(Box::new(node)),
            };
        }),
    ];
    for (keys, change) in cases {
        let mut expected = disk("virtio0", "/a");
        change(&mut expected);
        let line = format!("-kernel k -drive file=/a,if=virtio,format=raw,{keys}");
        assert_eq!(machine(&line).drives, [expected], "{keys}");
    }
}

/// A drive without `file=`, and with a description in its place.
#[test]
fn drives_are_described_by_their_nodes_options() {
    let node = |line: &str| machine(&format!("-kernel k {line}")).drives.remove(0).node;
    let described = node("-drive if=none,id=d,driver=qcow2,file.driver=file,file.filename=/a,backing.driver=null-co");
    let json = node(
        "-drive 'file=json:{\"driver\":\"qcow2\",,\"file\":{\"driver\":\"file\",,\"filename\":\"/a\"},,\"backing.driver\":\"null-co\"},if=none,id=d'",
    );
    let blockdev = |line: &str| machine(&format!("-kernel k {line}")).blockdevs.remove(0);
    let keys = blockdev("-blockdev qcow2,node-name=n,file.driver=file,file.filename=/a,backing.driver=null-co");
    let object = blockdev(
        "-blockdev '{\"driver\":\"qcow2\",\"node-name\":\"n\",\"file\":{\"driver\":\"file\",\"filename\":\"/a\"},\"backing\":{\"driver\":\"null-co\"}}'",
    );
    assert_eq!(described, json);
    assert_eq!(keys, object);
    assert_eq!(keys.driver, described.driver);
    assert_eq!(keys.name.as_deref(), Some("n"));
    let null = node("-drive driver=null-co,if=none,id=d,read-zeroes=on,size=1M");
    let DriverOptions::Null { bytes, read_zeroes, .. } = null.driver else {
        panic!("{null:?}")
    };
    assert!(bytes == 1 << 20 && read_zeroes);
}

/// A device may use a node by its name, wherever in a tree it is.
#[test]
fn devices_find_nodes() {
    let line = "-blockdev null-co,node-name=a -blockdev raw,node-name=b,file.driver=null-co,file.node-name=c \
                -device virtio-blk-pci,drive=a,write-cache=off,werror=stop -device virtio-blk-pci,drive=b";
    let devices = machine(&format!("-kernel k {line}")).devices;
    let blocks: Vec<_> = devices
        .iter()
        .map(|device| match &device.model {
            Model::Block(block) => (block.drive.as_str(), block.write_cache, block.write_error),
            Model::Rng(_) => panic!(),
        })
        .collect();
    assert_eq!(blocks, [("a", Some(false), Some(OnError::Stop)), ("b", None, None)]);
}

#[test]
fn drives_without_an_id_are_numbered_as_qemu_numbers_them() {
    let line = "-kernel k -drive file=a,if=virtio,format=raw -drive file=b,if=virtio,format=raw,id=x \
                -drive if=virtio,id=drive0,file=c,format=raw,cache=writeback,aio=threads \
                -drive file=d,if=virtio,format=raw";
    let ids: Vec<String> = machine(line).drives.into_iter().map(|drive| drive.backend.id).collect();
    assert_eq!(ids, ["virtio0", "x", "drive0", "virtio3"]);
}
