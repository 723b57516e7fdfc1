//! `-object`, `-device` and what connects them.

use super::{Invocation, machine, parse, refusal};
use crate::config::{BlockDevice, Device, Model, RngDevice};
use crate::objects::Spec;
use ipc::block::{Polling, RngLimit};
use proptest::prelude::*;
use std::ffi::OsString;

fn objects(line: &str) -> Vec<(String, Spec)> {
    machine(&format!("-kernel k {line}")).objects
}

fn devices(line: &str) -> Vec<Device> {
    machine(&format!("-kernel k {line}")).devices
}

#[test]
fn objects_in_both_forms() {
    let io_thread = Spec::IoThread(Polling {
        max_ns: 5,
        grow: 0,
        shrink: 0,
        max_batch: 3,
    });
    for line in [
        "-object iothread,id=a,poll-max-ns=5,aio-max-batch=3",
        "-object qom-type=iothread,aio-max-batch=3,id=a,poll-max-ns=5",
        "-object '{\"qom-type\":\"iothread\",\"id\":\"a\",\"poll-max-ns\":5,\"aio-max-batch\":3}'",
    ] {
        assert_eq!(objects(line), [("a".to_owned(), io_thread.clone())], "{line}");
    }
    assert_eq!(
        objects("-object rng-random,id=r -object rng-random,id=s,filename=a,,b"),
        [
            ("r".to_owned(), Spec::RngRandom("/dev/urandom".into())),
            ("s".to_owned(), Spec::RngRandom("a,b".into())),
        ]
    );
    let limits = objects("-object throttle-group,id=t,limits.iops-total=5,limits.iops-size=4096");
    let same = objects(
        "-object '{\"qom-type\":\"throttle-group\",\"id\":\"t\",\"limits\":{\"iops-size\":4096,\"iops-total\":5}}'",
    );
    assert_eq!(limits, same);
    assert_eq!(
        objects("-object throttle-group,id=t,x-iops-total=5,x-iops-size=4096"),
        same
    );
    assert_eq!(
        objects("-object memory-backend-memfd,id=m,size=64M"),
        objects("-object memory-backend-memfd,id=m,size=67108864,share=on"),
    );
}

#[test]
fn faults_of_objects_have_qemus_texts() {
    for (line, expected) in [
        ("-object nope,id=x", "Parameter 'qom-type' does not accept value 'nope'"),
        ("-object iothread", "Parameter 'id' is missing"),
        ("-object id=x", "Parameter 'qom-type' is missing"),
        ("-object iothread,id=1x", "Parameter 'id' expects an identifier"),
        ("-object iothread,id=x,foo=1", "Invalid parameter 'foo'"),
        (
            "-object iothread,id=x,poll-max-ns=abc",
            "Parameter 'poll-max-ns' expects an int64 value",
        ),
        (
            "-object iothread,id=x,poll-max-ns=-1",
            "poll-max-ns value must be in range [0, 9223372036854775807]",
        ),
        ("-object memory-backend-memfd,id=x", "Parameter 'size' is missing"),
        (
            "-object memory-backend-memfd,id=x,size=0",
            "property 'size' of memory-backend-memfd doesn't take value '0'",
        ),
        (
            "-object memory-backend-memfd,id=x,size=1M,seal=off",
            "'seal' must be on",
        ),
        (
            "-object throttle-group,id=x,limits.iops-zotal=1",
            "Invalid parameter 'limits.iops-zotal'",
        ),
        (
            "-object throttle-group,id=x,x-iops-total=1,x-iops-read=1",
            "cannot be used at the same time",
        ),
        ("-object secret,id=x", "Either 'file' or 'data' must be provided"),
        (
            "-object secret,id=x,data=a,file=b",
            "'file' and 'data' are mutually exclusive",
        ),
        (
            "-object secret,id=x,data=a,format=hex",
            "Parameter 'format' does not accept value 'hex'",
        ),
        (
            "-object iothread,id=x -object rng-builtin,id=x",
            "attempt to add duplicate property 'x' to object (type 'container')",
        ),
        ("-object '{\"qom-type\":'", "this is no JSON object of properties"),
        (
            "-object '{\"qom-type\":\"iothread\",\"id\":\"x\",\"poll-grow\":\"1\"}'",
            "Invalid parameter type for 'poll-grow', expected: integer",
        ),
        ("-machine memory-backend=m", "Memory backend 'm' not found"),
        (
            "-object memory-backend-memfd,id=m,size=64M -machine memory-backend=m -m 65",
            "Machine memory size does not match the size of the memory backend",
        ),
        (
            "-object memory-backend-memfd,id=m,size=64M,share=off -machine memory-backend=m",
            "the backend needs share=on",
        ),
        (
            "-spare-iothreads 16",
            "the count of spare iothreads is a number from 0 to 15",
        ),
    ] {
        let error = refusal(&format!("-kernel k {line}"));
        assert!(error.contains(expected), "{line}\n{error}");
    }
}

#[test]
fn a_memory_backend_makes_the_machine_as_large_as_it_is() {
    let machine = machine("-kernel k -object memory-backend-memfd,id=m,size=64M -machine q35,memory-backend=m");
    assert_eq!(machine.ram_bytes, 64 << 20);
    assert_eq!(machine.memory_backend.as_deref(), Some("m"));
}

#[test]
fn devices_take_the_first_free_slot_and_those_of_drives_come_last() {
    let line = "-drive file=a,if=virtio,format=raw -device virtio-rng-pci -drive file=b,if=none,format=raw,id=d \
                -device virtio-blk,drive=d,id=disk,iothread=io,num-queues=3,queue-size=64,serial=S,addr=01 \
                -object iothread,id=io -smp 2";
    let found = devices(line);
    let block = |drive: &str, io_thread: Option<&str>, queues, queue_size, serial: &str| {
        Model::Block(BlockDevice {
            drive: drive.into(),
            io_thread: io_thread.map(str::to_owned),
            queues,
            queue_size,
            serial: serial.into(),
            boot_index: None,
            write_cache: None,
            read_error: None,
            write_error: None,
        })
    };
    let limit = RngLimit {
        max_bytes: i64::MAX as u64,
        period_ms: 65_536,
    };
    let rng = Model::Rng(RngDevice { backend: None, limit });
    let device = |id: Option<&str>, slot, model| Device {
        id: id.map(str::to_owned),
        slot,
        model,
    };
    assert_eq!(
        found,
        [
            device(None, 2, rng),
            device(Some("disk"), 1, block("d", Some("io"), 3, 64, "S")),
            device(None, 3, block("virtio0", None, 2, 256, "")),
        ]
    );
    let limited = devices(
        "-object rng-builtin,id=r -device '{\"driver\":\"virtio-rng-pci\",\"rng\":\"r\",\"max-bytes\":10,\"period\":1000,\"addr\":40}'",
    );
    assert_eq!(limited[0].slot, 5);
    let Model::Rng(rng) = &limited[0].model else { panic!() };
    assert_eq!(rng.backend.as_deref(), Some("r"));
    assert_eq!((rng.limit.max_bytes, rng.limit.period_ms), (10, 1000));
    assert!(limited[0].uses("r") && !limited[0].uses("s"));
}

#[test]
fn faults_of_devices_have_qemus_texts() {
    let drive = "-drive file=a,if=none,format=raw,id=d";
    for (line, expected) in [
        ("-device nope", "'nope' is not a valid device model name"),
        ("-device virtio-blk-pci", "drive property not set"),
        (
            "-device virtio-blk-pci,drive=x",
            "Property 'virtio-blk-device.drive' can't find value 'x'",
        ),
        (
            "-device virtio-blk-pci,foo=1",
            "Property 'virtio-blk-pci.foo' not found",
        ),
        ("-device virtio-rng-pci,rng=x", "Device 'x' not found"),
        (
            "-object iothread,id=x -device virtio-rng-pci,rng=x",
            "Invalid parameter type for 'rng', expected: rng-backend",
        ),
        (
            "-device virtio-rng-pci,period=0",
            "'period' parameter expects a positive integer",
        ),
        (
            "-device virtio-rng-pci,max-bytes=-1",
            "'max-bytes' parameter must be non-negative, and less than 2^63",
        ),
        (
            "-device virtio-rng-pci,max-bytes=abc",
            "Parameter 'max-bytes' expects integer",
        ),
        (
            "-device virtio-blk-pci,drive=d -device virtio-blk-pci,drive=d",
            "Drive 'd' is already in use by another device",
        ),
        (
            "-device virtio-rng-pci,id=b -device virtio-rng-pci,id=b",
            "Duplicate device ID 'b'",
        ),
        (
            "-device virtio-rng-pci,addr=2 -device virtio-rng-pci,addr=2,id=b",
            "PCI: slot 2 function 0 not available for virtio-rng-pci, in use by virtio-rng-pci,id=(null)",
        ),
        ("-device virtio-rng-pci,addr=0", "in use by the host bridge"),
        (
            "-device virtio-rng-pci,addr=40",
            "Property 'virtio-rng-pci.addr' doesn't take value '40'",
        ),
        ("-device virtio-rng-pci,addr=2.1", "function 0 is the only one"),
        ("-device virtio-rng-pci,id=1x", "Parameter 'id' expects an identifier"),
        (
            "-device virtio-blk-pci,drive=d,num-queues=0",
            "num-queues property must be larger than 0",
        ),
        (
            "-device virtio-blk-pci,drive=d,queue-size=100",
            "invalid queue-size property (100), must be a power of 2 (max 1024)",
        ),
        ("-device virtio-blk-pci,drive=d,iothread=x", "Device 'x' not found"),
        ("-device virtio-rng-pci,bus=foo", "Bus 'foo' not found"),
    ] {
        let error = refusal(&format!("-kernel k {drive} {line}"));
        assert!(error.contains(expected), "{line}\n{error}");
    }
    let many = " -device virtio-rng-pci".repeat(25);
    assert!(refusal(&format!("-kernel k{many}")).contains("at most 24"));
}

#[test]
fn an_error_about_a_secret_does_not_show_it() {
    for line in [
        "-object secret,id=1x,data=letmein",
        "-object secret,data=letmein",
        "-object secret,id=s,data=letmein,foo=1",
        "-object secret,id=s,data=letmein,file=letmein",
        "-object secret,id=s,data=letmein,format=hex",
        "-object '{\"qom-type\":\"secret\",\"id\":\"s\",\"data\":\"letmein\",\"foo\":1}'",
        "-object '{\"qom-type\":\"secret\",\"id\":\"s\",\"data\":\"letmein\"'",
    ] {
        let error = refusal(&format!("-kernel k {line}"));
        assert!(!error.contains("letmein"), "{error}");
    }
    let config = machine("-kernel k -object secret,id=s,data=letmein");
    assert!(!format!("{config:?}").contains("letmein"));
}

fn parsed(option: &str, value: &str) -> Result<Invocation, String> {
    let arguments = ["-kernel", "k", option, value].map(OsString::from);
    parse(arguments.into_iter()).map_err(|error| error.to_string())
}

proptest! {
    /// Whatever a file name holds, both forms take it as it is.
    #[test]
    fn a_file_name_survives_both_forms(name in "[^\\x00]{1,40}") {
        let pairs = format!("rng-random,id=r,filename={}", name.replace(',', ",,"));
        let json = serde_json::json!({"qom-type": "rng-random", "id": "r", "filename": name}).to_string();
        for value in [pairs, json] {
            let Ok(Invocation::Run(machine)) = parsed("-object", &value) else {
                panic!("{value}")
            };
            prop_assert_eq!(&machine.objects, &[("r".to_owned(), Spec::RngRandom(name.clone().into()))]);
        }
    }

    /// Numbers mean the same in both forms, or are refused in both.
    #[test]
    fn limits_mean_the_same_in_both_forms(total in any::<i64>(), read in 0..3i64, burst in any::<i64>()) {
        let pairs = format!("throttle-group,id=t,limits.bps-total={total},limits.bps-read={read},limits.bps-total-max={burst}");
        let limits = serde_json::json!({"bps-total": total, "bps-read": read, "bps-total-max": burst});
        let json = serde_json::json!({"qom-type": "throttle-group", "id": "t", "limits": limits}).to_string();
        prop_assert_eq!(parsed("-object", &pairs), parsed("-object", &json));
    }

    /// No text does harm, and an error stays one line.
    #[test]
    fn arbitrary_values_give_a_machine_or_one_line(value in ".{0,60}", head in prop::sample::select(vec![
        "", "virtio-rng-pci,", "virtio-blk-pci,", "iothread,id=a,", "throttle-group,id=a,limits.", "secret,id=a,data=", "{\"", "{\"qom-type\":",
    ])) {
        for option in ["-object", "-device"] {
            if let Err(error) = parsed(option, &format!("{head}{value}")) {
                prop_assert!(!error.is_empty() && !error.contains(char::is_control), "{:?}", error);
            }
        }
    }

    /// A slot is what its hexadecimal digits say.
    #[test]
    fn slots_are_hexadecimal(slot in 0u8..64) {
        match parsed("-device", &format!("virtio-rng-pci,addr={slot:x}.0")) {
            Ok(Invocation::Run(machine)) => prop_assert_eq!(machine.devices[0].slot, slot),
            Ok(other) => panic!("{other:?}"),
            Err(error) => prop_assert!(slot == 0 || slot > 31, "{}", error),
        }
    }
}
