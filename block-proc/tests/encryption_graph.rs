//! Encrypted nodes in a real, sealed block-proc, under a guest's requests: what unlocking and ciphers ask of the kernel is
//! nothing.

mod common;
mod encryption_common;
mod qcow2_common;

use common::{F_FLUSH, Vm, file_spec, info, pattern, qcow2_spec};
use encryption_common::{assert_same_for_qemu, encrypted, secret};
use ipc::block::EngineChoice;
use ipc::graph::{Backing, DeviceOptions, GraphReply, GraphRequest, LuksSpec, NodeId, NodeSpec, OnError};
use ipc::secret::Secret;
use ipc::virtio::{DeviceIndex, IoThreadIndex};
use std::fs::File;

const BYTES: u64 = 1 << 20;
const FILE: NodeId = NodeId(20);
const NODE: NodeId = NodeId(21);

fn spec(format: &str, key: Option<Secret>) -> NodeSpec {
    match format {
        "luks" => NodeSpec::Luks(LuksSpec {
            file: FILE,
            read_only: false,
            key,
        }),
        _ => {
            let mut spec = qcow2_spec(FILE, Backing::None);
            spec.key = key;
            NodeSpec::Qcow2(spec)
        }
    }
}

#[test]
fn a_guest_reads_and_writes_encrypted_disks() {
    let folder = tempfile::tempdir().unwrap();
    for (engine, format, options) in [
        (EngineChoice::Auto, "luks", "iter-time=10"),
        (
            EngineChoice::Threads,
            "qcow2",
            "encrypt.format=luks,encrypt.iter-time=10",
        ),
        (EngineChoice::Auto, "qcow2", "encrypt.format=aes"),
    ] {
        let mut model = pattern(1, BYTES as usize);
        let path = folder.path().join("disk");
        std::fs::write(&path, encrypted(folder.path(), format, options, &model)).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let mut vm = Vm::start(engine, &[1]);
        let file_info = info(file.metadata().unwrap().len());
        vm.add(IoThreadIndex::MAIN, FILE, file_spec(&file, file_info));
        let mut add = |key| {
            vm.graph(GraphRequest::Add {
                node: NODE,
                thread: IoThreadIndex::MAIN,
                spec: spec(format, key),
            })
        };
        // A refused node is not there: the same number is tried again.
        let missing = add(None).unwrap_err();
        assert!(
            missing.message.ends_with("key-secret' is required for cipher"),
            "{missing}"
        );
        assert_eq!(missing.errno, Some(libc::ENOKEY));
        if options.contains("iter-time") {
            let wrong = add(secret("hunter3")).unwrap_err();
            assert_eq!(wrong.message, "Invalid password, cannot unlock any keyslot");
            assert_eq!(wrong.errno, Some(libc::EKEYREJECTED));
        }
        let Ok(GraphReply::Added(report)) = add(secret("hunter2")) else {
            panic!("{format} does not open");
        };
        assert_eq!(report.bytes, BYTES);
        let attach = GraphRequest::Attach {
            device: DeviceIndex(0),
            node: NODE,
            options: DeviceOptions {
                read_only: false,
                write_cache: true,
                serial: String::new(),
                logical_block_bytes: 512,
                read_error: OnError::Report,
                write_error: OnError::Report,
            },
        };
        assert!(matches!(vm.graph(attach), Ok(GraphReply::Attached(_))));
        let mut queue = vm.activate(0, F_FLUSH).remove(0);
        for sector in [0, 7, 2047] {
            let at = sector as usize * 512;
            assert_eq!(queue.read(sector, 512), (0, model[at..at + 512].to_vec()), "{format}");
            let data = pattern(sector + 5, 512);
            assert_eq!(queue.write(sector, &data), 0);
            model[at..at + 512].copy_from_slice(&data);
            assert_eq!(queue.read(sector, 512), (0, data), "{format}");
        }
        assert_eq!(queue.ask(common::T_FLUSH, 0, None).0, 0);
        drop(vm);
        assert_same_for_qemu(folder.path(), format, &std::fs::read(&path).unwrap(), &model);
    }
}
