//! The test guest on `bulkhead` with the real sandbox: what a machine does, seen from inside and over QMP.

use bulkhead_tests::machine::{Machine, wait_until};
use bulkhead_tests::{guest, need_kvm, procfs};
use serde_json::json;
use std::path::Path;

fn machine(append: &str, more: &str) -> Machine {
    let arguments = format!("-m 256 -smp 4 -kernel {} {more}", guest::image().display());
    start(tempfile::tempdir().unwrap(), append, &arguments)
}

/// `-append` takes blanks, at which the other arguments are split.
fn start(directory: tempfile::TempDir, append: &str, arguments: &str) -> Machine {
    Machine::start_with(directory, arguments, &["-append", append])
}

fn disk(directory: &Path, name: &str, mib: u64) {
    std::fs::File::create(directory.join(name)).unwrap().set_len(mib << 20).unwrap();
}

#[track_caller]
fn finished(mut machine: Machine) -> String {
    let status = machine.wait();
    let serial = machine.serial();
    assert_eq!(guest::value(&serial, "done", "failures"), Some("0"), "the guest said:\n{serial}\nlog: {}", machine.log());
    assert_eq!(status.code(), Some(0), "{}", machine.log());
    serial
}

#[test]
fn the_guest_finds_its_hardware_and_powers_off() {
    need_kvm!();
    let serial = finished(machine("test=hello test=acpi test=pci test=rtc test=smp cpus=4", ""));
    assert!(guest::report(&serial).contains(&"ok hello"), "{serial}");
}

#[test]
fn a_flat_image_boots_too() {
    need_kvm!();
    let arguments = format!("-m 128 -kernel {}", guest::flat_image().display());
    let serial = finished(start(tempfile::tempdir().unwrap(), "test=hello", &arguments));
    assert!(guest::report(&serial).contains(&"ok hello"), "{serial}");
}

#[test]
fn memory_above_the_pci_hole_boots() {
    need_kvm!();
    let arguments = format!("-m 5G -kernel {}", guest::image().display());
    finished(start(tempfile::tempdir().unwrap(), "test=hello test=acpi test=pci", &arguments));
}

/// 64 MiB through PCI discovery, MSI-X and 4 queues; the image holds what the guest says it read back.
#[test]
fn what_the_guest_wrote_through_four_queues_is_in_the_image() {
    need_kvm!();
    for aio in ["io_uring,cache.direct=on", "threads"] {
        let directory = tempfile::tempdir().unwrap();
        disk(directory.path(), "disk", 80);
        let image = directory.path().join("disk");
        let arguments = format!(
            "-m 256 -smp 4 -kernel {} -drive file={{dir}}/disk,if=virtio,format=raw,id=d,num-queues=4,discard=unmap,aio={aio}",
            guest::image().display()
        );
        let machine = start(directory, "test=blk test=pci-move test=blk-verify mib=64 seed=42 queues=4", &arguments);
        // The machine's scratch directory goes with it: keep the image open.
        let mut file = std::fs::File::open(&image).unwrap();
        let serial = finished(machine);
        assert_eq!(guest::value(&serial, "blk-verify", "queues"), Some("4"), "{serial}");
        let expected = format!("{:#018x}", guest::pattern_checksum(64, 42));
        assert_eq!(guest::value(&serial, "blk-verify", "checksum"), Some(&*expected), "{serial}");
        let mut data = vec![0; 64 << 20];
        std::io::Read::read_exact(&mut file, &mut data).unwrap();
        assert_eq!(format!("{:#018x}", guest::checksum(&data)), expected);
    }
}

#[test]
fn a_read_only_disk_refuses_writes() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    disk(directory.path(), "disk", 16);
    let arguments =
        format!("-m 256 -kernel {} -drive file={{dir}}/disk,if=virtio,format=raw,readonly=on", guest::image().display());
    let serial = finished(start(directory, "test=blk", &arguments));
    assert_eq!(guest::value(&serial, "blk", "ro"), Some("1"), "{serial}");
}

fn spin_count(machine: &Machine) -> usize {
    guest::report(&machine.serial()).iter().filter(|line| line.starts_with("spin")).count()
}

#[test]
fn stop_really_stops_the_guest_and_cont_lets_it_go_on() {
    need_kvm!();
    let mut machine = machine("test=spin", "");
    let mut qmp = machine.qmp();
    machine.wait_for_serial("spin");
    qmp.run("stop");
    assert_eq!(qmp.event()["event"], json!("STOP"));
    assert_eq!(qmp.run("query-status"), json!({"running": false, "status": "paused"}));
    let stopped_at = spin_count(&machine);
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(spin_count(&machine), stopped_at, "the guest went on while stopped");
    qmp.run("stop");
    qmp.run("cont");
    assert_eq!(qmp.event()["event"], json!("RESUME"));
    assert_eq!(qmp.run("query-status"), json!({"running": true, "status": "running"}));
    wait_until("the guest goes on", || spin_count(&machine) > stopped_at);
}

#[test]
fn with_s_the_guest_waits_for_cont() {
    need_kvm!();
    let mut machine = machine("test=hello", "-S");
    let mut qmp = machine.qmp();
    assert_eq!(qmp.run("query-status"), json!({"running": false, "status": "prelaunch"}));
    assert_eq!(machine.serial(), "");
    qmp.run("cont");
    assert_eq!(qmp.wait_event("SHUTDOWN"), json!({"guest": true, "reason": "guest-shutdown"}));
    finished(machine);
}

#[test]
fn a_reset_starts_the_kernel_again() {
    need_kvm!();
    let mut machine = machine("test=spin", "");
    let mut qmp = machine.qmp();
    machine.wait_for_serial("spin");
    // The guest counts from 0 each time.
    let boots = |machine: &Machine| guest::report(&machine.serial()).iter().filter(|line| **line == "spin 0").count();
    let before = boots(&machine);
    qmp.run("system_reset");
    assert_eq!(qmp.wait_event("RESET"), json!({"guest": false, "reason": "host-qmp-system-reset"}));
    wait_until("the guest boots again", || boots(&machine) > before);
    assert_eq!(qmp.run("query-status")["status"], json!("running"));
}

#[test]
fn the_guests_own_reset_is_told_and_carried_out() {
    need_kvm!();
    for how in ["i8042", "acpi", "triple"] {
        let mut machine = machine(&format!("test=spin count=3 test=reset how={how}"), "");
        let mut qmp = machine.qmp();
        assert_eq!(qmp.wait_event("RESET"), json!({"guest": true, "reason": "guest-reset"}), "{how}");
        assert_eq!(qmp.run("query-status")["status"], json!("running"));
    }
    let mut machine = machine("test=spin count=3 test=reset how=i8042", "-no-reboot");
    let mut qmp = machine.qmp();
    assert_eq!(qmp.wait_event("SHUTDOWN"), json!({"guest": true, "reason": "guest-reset"}));
    assert_eq!(machine.wait().code(), Some(0));
}

#[test]
fn a_guest_panic_is_told_and_ends_the_machine() {
    need_kvm!();
    let mut ending = machine("test=spin count=3 test=panic", "");
    let mut qmp = ending.qmp();
    assert_eq!(qmp.wait_event("GUEST_PANICKED"), json!({"action": "poweroff"}));
    assert_eq!(qmp.wait_event("SHUTDOWN"), json!({"guest": true, "reason": "guest-panic"}));
    assert_eq!(ending.wait().code(), Some(0));
    let mut staying = machine("test=spin count=3 test=panic", "-no-shutdown");
    let mut qmp = staying.qmp();
    assert_eq!(qmp.wait_event("GUEST_PANICKED"), json!({"action": "pause"}));
    qmp.wait_event("STOP");
    assert_eq!(qmp.run("query-status"), json!({"running": false, "status": "guest-panicked"}));
}

#[test]
fn no_shutdown_keeps_a_machine_that_powered_off() {
    need_kvm!();
    let mut machine = machine("test=hello", "-no-shutdown");
    let mut qmp = machine.qmp();
    wait_until("the machine is shut down", || qmp.run("query-status")["status"] == json!("shutdown"));
    let error = qmp.try_execute("cont", json!({})).unwrap_err();
    assert_eq!(error["desc"], json!("Resetting the Virtual Machine is required"));
    qmp.run("system_reset");
    qmp.wait_event("RESET");
    wait_until("the machine is ready again", || qmp.run("query-status")["status"] == json!("prelaunch"));
    qmp.run("quit");
    wait_until("the machine ends", || !procfs::is_alive(machine.pid()));
}

#[test]
fn the_power_button_reaches_the_guest() {
    need_kvm!();
    let mut machine = machine("test=powerbutton", "");
    let mut qmp = machine.qmp();
    machine.wait_for_serial("powerbutton");
    qmp.run("system_powerdown");
    qmp.wait_event("POWERDOWN");
    assert_eq!(qmp.wait_event("SHUTDOWN"), json!({"guest": true, "reason": "guest-shutdown"}));
    assert_eq!(machine.wait().code(), Some(0));
}

#[test]
fn quit_answers_and_ends_with_nothing_left() {
    need_kvm!();
    let mut machine = machine("test=spin", "");
    let mut qmp = machine.qmp();
    machine.wait_for_serial("spin");
    let pids: Vec<i32> = machine.helpers().into_iter().map(|(_, pid)| pid).chain([machine.launcher()]).collect();
    qmp.run("quit");
    assert_eq!(qmp.wait_event("SHUTDOWN"), json!({"guest": false, "reason": "host-qmp-quit"}));
    assert!(qmp.is_closed());
    assert_eq!(machine.wait().code(), Some(0));
    wait_until("no process is left", || !pids.iter().any(|pid| procfs::is_alive(*pid)));
}

#[test]
fn queries_tell_what_the_machine_is() {
    need_kvm!();
    let mut machine = machine("test=spin", "");
    let mut qmp = machine.qmp();
    assert_eq!(qmp.greeting["QMP"]["version"]["qemu"]["major"], json!(10));
    assert_eq!(qmp.run("query-name"), json!({"name": "test"}));
    assert_eq!(qmp.run("query-kvm"), json!({"enabled": true, "present": true}));
    let cpus = qmp.run("query-cpus-fast");
    let cpus = cpus.as_array().unwrap();
    assert_eq!(cpus.len(), 4);
    let vcpu_proc = machine.helper("vcpu-proc");
    for (index, cpu) in cpus.iter().enumerate() {
        assert_eq!(cpu["cpu-index"], json!(index));
        let thread = cpu["thread-id"].as_i64().unwrap();
        assert!(Path::new(&format!("/proc/{vcpu_proc}/task/{thread}")).exists(), "{thread} is no host thread of vcpu-proc");
    }
    let commands = qmp.run("query-commands");
    let names: Vec<&str> = commands.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    for name in ["query-status", "stop", "cont", "quit", "system_reset", "system_powerdown", "query-version"] {
        assert!(names.contains(&name), "{names:?}");
    }
    let error = qmp.try_execute("no-such-command", json!({})).unwrap_err();
    assert_eq!(error["class"], json!("CommandNotFound"));
}

#[test]
fn a_memory_dump_holds_the_guests_memory() {
    need_kvm!();
    let mut machine = machine("test=spin", "");
    let mut qmp = machine.qmp();
    machine.wait_for_serial("spin");
    let path = machine.path("core");
    qmp.execute("dump-guest-memory", json!({"paging": false, "protocol": format!("file:{}", path.display())}));
    assert_eq!(qmp.event()["event"], json!("STOP"));
    let completed = qmp.event();
    assert_eq!(completed["event"], json!("DUMP_COMPLETED"));
    assert_eq!(completed["data"]["result"]["completed"], json!(256 << 20));
    assert_eq!(qmp.event()["event"], json!("RESUME"));
    assert_eq!(qmp.run("query-status")["status"], json!("running"));
    let core = std::fs::read(&path).unwrap();
    assert_eq!(&core[..4], b"\x7fELF");
    // The guest's own image is in its RAM: look for the text that it prints.
    assert!(core.windows(5).any(|window| window == b"BHG: "), "the guest's memory is not in the dump");
    assert!(!machine.helpers().iter().any(|(name, _)| name == "dump-proc"), "dump-proc stays");
    let refused = qmp.try_execute("dump-guest-memory", json!({"paging": false, "protocol": "file:/nonexistent/d"})).unwrap_err();
    assert_eq!(refused["desc"], json!("Could not create '/nonexistent/d': No such file or directory"));
}

#[test]
fn a_serial_port_on_a_socket_carries_bytes_both_ways_for_one_client_after_the_other() {
    need_kvm!();
    use std::io::{Read, Write};
    let directory = tempfile::tempdir().unwrap();
    let arguments = format!("-m 64 -kernel {} -serial unix:{{dir}}/tty,server=on,wait=off", guest::image().display());
    let mut machine = Machine::start_without_serial(directory, &arguments, &["-append", "test=echo"]);
    machine.qmp();
    for text in ["first", "second"] {
        let mut client = std::os::unix::net::UnixStream::connect(machine.path("tty")).unwrap();
        client.set_read_timeout(Some(bulkhead_tests::machine::PATIENCE)).unwrap();
        let mut seen = String::new();
        let mut buffer = [0; 256];
        while !seen.contains(text) {
            // Again and again: what was typed before the guest listened is lost, as on a real line.
            client.write_all(text.as_bytes()).unwrap();
            let length = client.read(&mut buffer).unwrap();
            seen += &String::from_utf8_lossy(&buffer[..length]);
        }
    }
}
