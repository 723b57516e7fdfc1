//! Looking into a guest from outside: what clients read is what the guest has there.

use bulkhead_tests::guest::{self, flat_from_elf};
use bulkhead_tests::machine::Machine;
use bulkhead_tests::need_kvm;
use bulkhead_tests::qmp::Qmp;
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;

/// Where the test guest's image is in memory, and the image: its first bytes never change.
struct Image {
    address: u64,
    bytes: Vec<u8>,
}

impl Image {
    fn new() -> Self {
        let bytes = flat_from_elf(&std::fs::read(guest::image()).unwrap()).unwrap();
        let address = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
        Self { address, bytes }
    }

    /// A part that is the same for the whole life of the guest: code that is as long as it.
    fn code(&self, length: usize) -> &[u8] {
        &self.bytes[..length]
    }
}

fn paused(more: &str) -> Machine {
    Machine::start(&format!(
        "-m 64 -S -append test=spin -kernel {} {more}",
        guest::image().display()
    ))
}

/// A machine whose guest has set up paging and counts.
fn running(more: &str) -> Machine {
    let mut machine = Machine::start(&format!(
        "-m 64 -append test=spin -kernel {} {more}",
        guest::image().display()
    ));
    machine.wait_for_serial("spin 1");
    machine
}

fn save(machine: &Machine, qmp: &mut Qmp, command: &str, address: i64, size: i64) -> Result<Vec<u8>, String> {
    let file = machine.path("saved");
    let arguments = json!({"val": address, "size": size, "filename": file.to_str().unwrap()});
    match qmp.try_execute(command, arguments) {
        Ok(nothing) => {
            assert_eq!(nothing, json!({}));
            Ok(std::fs::read(&file).unwrap())
        }
        Err(error) => {
            assert_eq!(error["class"], "GenericError");
            Err(error["desc"].as_str().unwrap().to_owned())
        }
    }
}

fn refused(qmp: &mut Qmp, command: &str, arguments: Value) -> String {
    let error = qmp.try_execute(command, arguments).unwrap_err();
    assert_eq!(error["class"], "GenericError");
    error["desc"].as_str().unwrap().to_owned()
}

/// Writes words into a paused machine's RAM, as a hostile guest could: through the supervisor's own descriptor.
fn poke(machine: &Machine, words: &[(u64, u64)]) {
    let directory = format!("/proc/{}/fd", machine.pid());
    let memory = std::fs::read_dir(directory).unwrap().find_map(|entry| {
        let path = entry.unwrap().path();
        let target = std::fs::read_link(&path).ok()?;
        target.to_str()?.contains("memfd:").then_some(path)
    });
    let memory = std::fs::OpenOptions::new().write(true).open(memory.unwrap()).unwrap();
    for (address, word) in words {
        memory.write_all_at(&word.to_le_bytes(), *address).unwrap();
    }
}

#[test]
fn saved_memory_is_the_guests_by_physical_and_by_virtual_address() {
    need_kvm!();
    let image = Image::new();
    let mut machine = running("");
    let mut qmp = machine.qmp();
    let address = image.address as i64;
    for command in ["pmemsave", "memsave"] {
        assert_eq!(
            save(&machine, &mut qmp, command, address, 0x1801).unwrap(),
            image.code(0x1801)
        );
        // A shorter save leaves nothing of the longer one.
        assert_eq!(
            save(&machine, &mut qmp, command, address + 1, 7).unwrap(),
            image.code(8)[1..]
        );
        assert_eq!(save(&machine, &mut qmp, command, address, 0).unwrap(), b"");
    }
    assert_eq!(qmp.run("query-status")["status"], "running");
}

#[test]
fn whole_memory_is_saved_with_its_holes() {
    use std::os::unix::fs::MetadataExt;
    need_kvm!();
    let image = Image::new();
    let mut machine = paused("");
    let mut qmp = machine.qmp();
    let whole = save(&machine, &mut qmp, "pmemsave", 0, 64 << 20).unwrap();
    assert_eq!(whole.len(), 64 << 20);
    assert_eq!(whole[image.address as usize..][..0x1000], *image.code(0x1000));
    let written = machine.path("saved").metadata().unwrap().blocks() * 512;
    assert!(written < 32 << 20, "{written} bytes for a guest that has hardly begun");
}

#[test]
fn where_there_is_no_ram_physical_memory_is_zeros_and_virtual_memory_is_refused() {
    need_kvm!();
    let mut machine = running("");
    let mut qmp = machine.qmp();
    let end = 64 << 20;
    let across = save(&machine, &mut qmp, "pmemsave", end - 8, 4096).unwrap();
    assert_eq!(across.len(), 4096);
    assert!(across[8..].iter().all(|byte| *byte == 0));
    assert_eq!(save(&machine, &mut qmp, "pmemsave", -1, 10).unwrap(), [0; 10]);
    // The test guest maps 4 GiB one to one, whether there is RAM or not, and nothing above.
    for (address, size) in [(end - 8, 4096), (0xfee0_0000, 4), (1 << 33, 1), (-16, 4), (1 << 47, 8)] {
        assert_eq!(
            save(&machine, &mut qmp, "memsave", address, size).unwrap_err(),
            format!("Invalid addr 0x{address:016x}/size {size} specified")
        );
    }
}

#[test]
fn refusals_are_the_protocols() {
    need_kvm!();
    let mut machine = paused("-smp 2");
    let mut qmp = machine.qmp();
    let arguments = |more: Value| {
        let mut arguments = json!({"val": 0, "size": 16, "filename": "/nowhere/file"});
        arguments
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        arguments
    };
    let no_file = "Could not open '/nowhere/file': No such file or directory";
    assert_eq!(refused(&mut qmp, "pmemsave", arguments(json!({}))), no_file);
    assert_eq!(
        refused(&mut qmp, "memsave", arguments(json!({"cpu-index": 1}))),
        no_file
    );
    for index in [2, -1, i64::MAX] {
        assert_eq!(
            refused(&mut qmp, "memsave", arguments(json!({"cpu-index": index}))),
            "Parameter 'cpu-index' expects a CPU number"
        );
    }
    assert_eq!(
        refused(&mut qmp, "pmemsave", arguments(json!({"size": -1}))),
        "Parameter 'size' expects a non-negative value"
    );
    assert_eq!(
        refused(&mut qmp, "pmemsave", arguments(json!({"filename": "/dev/full"}))),
        "writing memory to '/dev/full' failed: No space left on device"
    );
    assert_eq!(
        refused(&mut qmp, "memsave", json!({"val": 0, "size": 1})),
        "Parameter 'filename' is missing"
    );
}

#[test]
fn hostile_page_tables_are_an_error_or_what_they_say_and_no_more_work_than_that() {
    need_kvm!();
    let mut machine = running("");
    let mut qmp = machine.qmp();
    qmp.run("stop");
    let registers = human(&mut qmp, "info registers");
    let top = registers
        .split_whitespace()
        .find_map(|word| word.strip_prefix("CR3="))
        .map(|number| u64::from_str_radix(number, 16).unwrap())
        .unwrap();
    // One entry leads to its own table, one outside of RAM, one to a device, one to the end of the address space.
    let entries = [top, 1 << 40, 0xfee0_0000, 0x000f_ffff_ffff_f000].map(|table| table | 0x27);
    let words: Vec<_> = (1_u64..)
        .zip(entries)
        .map(|(slot, entry)| (top + 8 * slot, entry))
        .collect();
    poke(&machine, &words);
    // Four times through its own entry, the walk ends at the table itself.
    let own = 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12;
    let table = save(&machine, &mut qmp, "memsave", own, 4096).unwrap();
    assert_eq!(table[8..16], (top | 0x27).to_le_bytes());
    for slot in 2..5_i64 {
        let address = slot << 39;
        assert_eq!(
            save(&machine, &mut qmp, "memsave", address, 4096).unwrap_err(),
            format!("Invalid addr 0x{address:016x}/size 4096 specified")
        );
    }
    // The process that walked them is not the worse for it.
    assert_eq!(
        save(&machine, &mut qmp, "memsave", own, 8).unwrap(),
        (table[..8]).to_vec()
    );
}

#[test]
fn a_save_that_takes_for_ever_delays_no_other_monitor_and_ends_with_the_machine() {
    need_kvm!();
    let mut machine = Machine::start(&format!(
        "-m 64 -append test=spin -kernel {} -qmp unix:{{dir}}/other,server=on,wait=off",
        guest::image().display()
    ));
    let mut qmp = machine.qmp();
    let fifo = machine.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Opened for both, so that there is a reader that reads nothing.
    let _reader = std::fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    qmp.send(&json!({"execute": "pmemsave", "arguments":
        {"val": 0, "size": 64 << 20, "filename": fifo.to_str().unwrap()}}))
        .unwrap();
    let mut other = Qmp::connect(&machine.path("other")).unwrap();
    bulkhead_tests::machine::wait_until("a process saves", || {
        machine.helpers().iter().any(|(name, _)| name == "dump-proc")
    });
    assert_eq!(other.run("query-status")["status"], "running");
    assert!(save(&machine, &mut other, "pmemsave", 0, 4096).is_ok());
    assert_eq!(other.run("query-dump")["status"], "none");
    other.run("quit");
    assert!(machine.wait().success());
}

fn human(qmp: &mut Qmp, line: &str) -> String {
    let text = qmp.execute("human-monitor-command", json!({"command-line": line}));
    text.as_str().unwrap().to_owned()
}

/// The bytes that `x` or `xp` has shown, and whether it came to an end too early.
fn shown(text: &str) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    for line in text.lines() {
        let (_, items) = line.split_once(": ").unwrap_or_else(|| panic!("{text}"));
        if items.starts_with("Cannot access memory") {
            return (bytes, true);
        }
        let items = items.split_whitespace();
        bytes.extend(items.map(|item| u8::from_str_radix(item.strip_prefix("0x").unwrap(), 16).unwrap()));
    }
    (bytes, false)
}

#[test]
fn memory_is_shown_by_physical_and_by_virtual_address() {
    need_kvm!();
    let image = Image::new();
    let mut machine = running("-smp 2");
    let mut qmp = machine.qmp();
    for command in ["x", "xp"] {
        let line = format!("{command} /4097xb {:#x} + 3", image.address);
        assert_eq!(shown(&human(&mut qmp, &line)), (image.code(4100)[3..].to_vec(), false));
        let magic = format!("{command} /1xg {}", image.address);
        assert_eq!(
            human(&mut qmp, &magic),
            format!("{:016x}: 0x343654414c464842\r\n", image.address)
        );
        // RAM ends at 64 MiB.
        let (bytes, ended) = shown(&human(&mut qmp, &format!("{command} /100xb 0x3fffff0")));
        assert_eq!((bytes.len(), ended), (16, true));
    }
    // As much as there can be.
    assert_eq!(shown(&human(&mut qmp, "xp /131072xb 0")).0.len(), 131_072);
    assert!(human(&mut qmp, "xp /131073xb 0").starts_with("at most 131072 bytes"));
    // The second processor has not been started: its addresses are physical, and have 32 bits.
    let second = json!({"command-line": "x /1xb 0x100000000", "cpu-index": 1});
    assert_eq!(
        qmp.execute("human-monitor-command", second),
        "0000000100000000: Cannot access memory\r\n"
    );
    assert_eq!(
        refused(
            &mut qmp,
            "human-monitor-command",
            json!({"command-line": "x 0", "cpu-index": 2})
        ),
        "Parameter 'cpu-index' expects a CPU number"
    );
    assert_eq!(human(&mut qmp, "gva2gpa 0x123456"), "gpa: 0x123456\r\n");
    assert_eq!(human(&mut qmp, "gva2gpa 0x200000000"), "Unmapped\r\n");
    assert!(human(&mut qmp, "gpa2hva 0").starts_with("Host addresses are not told"));
    assert_eq!(human(&mut qmp, "foo bar"), "unknown command: 'foo'\r\n");
}

#[test]
fn the_process_that_looks_is_started_once_and_again_when_it_was_killed() {
    need_kvm!();
    let mut machine = paused("");
    let mut qmp = machine.qmp();
    let dumpers = |machine: &Machine| -> Vec<i32> {
        let helpers = machine.helpers().into_iter();
        helpers
            .filter(|(name, _)| name == "dump-proc")
            .map(|(_, pid)| pid)
            .collect()
    };
    assert!(dumpers(&machine).is_empty());
    let first = human(&mut qmp, "xp /16xb 0x100000");
    let before = dumpers(&machine);
    assert_eq!(before.len(), 1);
    assert_eq!(human(&mut qmp, "xp /16xb 0x100000"), first);
    assert_eq!(dumpers(&machine), before);
    let killed = nix::unistd::Pid::from_raw(before[0]);
    nix::sys::signal::kill(killed, nix::sys::signal::Signal::SIGKILL).unwrap();
    bulkhead_tests::machine::wait_until("it is reaped", || dumpers(&machine).is_empty());
    assert_eq!(human(&mut qmp, "xp /16xb 0x100000"), first);
    assert_ne!(dumpers(&machine), before);
    assert_eq!(qmp.run("query-status")["status"], "prelaunch");
    // Dumps do not mind it.
    let dump = json!({"paging": false, "protocol": format!("file:{}", machine.path("dump").display())});
    qmp.execute("dump-guest-memory", dump);
    assert_eq!(qmp.run("query-dump")["status"], "completed");
}

/// The number behind `name=` in a text.
fn register(text: &str, name: &str) -> u64 {
    let found = text
        .split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    u64::from_str_radix(found.unwrap_or_else(|| panic!("no {name} in {text}")), 16).unwrap()
}

#[test]
fn registers_are_those_of_the_guests_loop() {
    need_kvm!();
    let image = Image::new();
    let mut machine = Machine::start(&format!(
        "-m 64 -smp 2 -append test=hang -kernel {}",
        guest::image().display()
    ));
    machine.wait_for_serial("hang");
    let mut qmp = machine.qmp();
    bulkhead_tests::machine::wait_until("the processor is halted", || {
        human(&mut qmp, "info registers").contains(" HLT=1")
    });
    let text = human(&mut qmp, "info registers");
    assert!(text.starts_with("\r\nCPU#0\r\nRAX="), "{text}");
    let code = image.address..image.address + image.bytes.len() as u64;
    assert!(code.contains(&register(&text, "RIP")), "{text}");
    assert!(code.contains(&register(&text, "CR3")), "{text}");
    // Long mode, and what boot.s sets.
    assert_eq!(register(&text, "EFER") & 0x500, 0x500, "{text}");
    assert_eq!(register(&text, "CR0") & 0x8000_0033, 0x8000_0033, "{text}");
    assert!(text.contains("\r\nGDT=     "), "{text}");
    // A halt is ring 0's: the code segment is the kernel's.
    assert!(text.contains("CS =0010 0000000000000000 "), "{text}");
    let all = human(&mut qmp, "info registers -a");
    assert!(
        all.contains("\r\nCPU#0\r\nRAX=") && all.contains("\r\nCPU#1\r\nEAX="),
        "{all}"
    );
    assert!(human(&mut qmp, "info registers 1").starts_with("\r\nCPU#1\r\nEAX="));
    assert_eq!(human(&mut qmp, "info registers 2"), "there is no such vCPU\r\n");
    let second = json!({"command-line": "info registers", "cpu-index": 1});
    let second = qmp.execute("human-monitor-command", second);
    assert!(second.as_str().unwrap().starts_with("\r\nCPU#1\r\n"));
}

#[test]
fn information_says_what_queries_say() {
    need_kvm!();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("disk"), [0; 4096]).unwrap();
    let mut machine = Machine::start_in(
        directory,
        &format!(
            "-m 64 -smp 2 -S -append test=spin -kernel {} -uuid 550e8400-e29b-41d4-a716-4466554400ff \
             -drive file={{dir}}/disk,if=virtio,format=raw,readonly=on,id=d0",
            guest::image().display()
        ),
    );
    let mut qmp = machine.qmp();
    assert_eq!(human(&mut qmp, "info status"), "VM status: paused (prelaunch)\r\n");
    qmp.run("cont");
    assert_eq!(human(&mut qmp, "info status"), "VM status: running\r\n");
    assert_eq!(human(&mut qmp, "info name"), "test\r\n");
    assert_eq!(human(&mut qmp, "info uuid"), "550e8400-e29b-41d4-a716-4466554400ff\r\n");
    assert_eq!(human(&mut qmp, "info kvm"), "kvm support: enabled\r\n");
    assert!(human(&mut qmp, "info version").starts_with("10.0.0"));
    let threads = qmp.run("query-cpus-fast");
    let lines: Vec<_> = threads
        .as_array()
        .unwrap()
        .iter()
        .map(|cpu| cpu["thread-id"].clone())
        .collect();
    assert_eq!(
        human(&mut qmp, "info cpus"),
        format!(
            "* CPU #0: thread_id={}\r\n  CPU #1: thread_id={}\r\n",
            lines[0], lines[1]
        )
    );
    let disk = machine.path("disk");
    let block = human(&mut qmp, "info block");
    assert!(
        block.starts_with(&format!("d0 (#block002): {} (raw, read-only)\r\n", disk.display())),
        "{block}"
    );
    assert_eq!(human(&mut qmp, "info block d0"), block);
    assert_eq!(human(&mut qmp, "info block d1"), "");
    let map = human(&mut qmp, "info mtree -f");
    assert!(
        map.starts_with("FlatView #0\r\n AS \"memory\", root: system\r\n Root memory region: system\r\n"),
        "{map}"
    );
    assert!(
        map.contains("\r\n  0000000000000000-0000000003ffffff (prio 0, ram): ram\r\n"),
        "{map}"
    );
    assert!(
        map.contains(": pci-1-bar-") && map.contains("00000000000003f8-00000000000003ff (prio 0, i/o): serial\r\n"),
        "{map}"
    );
}

#[test]
fn a_read_only_monitor_neither_saves_nor_has_the_human_monitor() {
    need_kvm!();
    let mut machine = Machine::start(&format!(
        "-m 64 -S -append test=spin -kernel {} -chardev socket,id=c,path={{dir}}/narrow,server=on,wait=off \
         -mon chardev=c,mode=control,allow=read-only",
        guest::image().display()
    ));
    machine.qmp();
    let mut narrow = Qmp::connect(&machine.path("narrow")).unwrap();
    for command in ["human-monitor-command", "memsave", "pmemsave"] {
        let error = narrow
            .try_execute(command, json!({"command-line": "info status"}))
            .unwrap_err();
        assert_eq!(error["class"], "CommandNotFound", "{command}");
    }
}

#[test]
fn cpu_models_expand_to_what_this_host_gives_a_guest() {
    need_kvm!();
    let mut machine = paused("-cpu host,-clflush");
    let mut qmp = machine.qmp();
    let ask = |kind: &str, model: Value| json!({"type": kind, "model": model});
    let command = "query-cpu-model-expansion";
    let full = qmp.execute(command, ask("full", json!({"name": "host"})));
    let properties = &full["model"]["props"];
    assert_eq!(full["model"]["name"], "host");
    // What every x86-64 processor has; and what the machine's own -cpu says is another matter.
    for name in ["fpu", "sse2", "lm", "clflush"] {
        assert_eq!(properties[name], true, "{name}");
    }
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let fact = |name: &str| {
        let line = info.lines().find(|line| line.split(':').next().unwrap().trim() == name);
        line.unwrap().split_once(':').unwrap().1.trim().to_owned()
    };
    assert_eq!(properties["vendor"], json!(fact("vendor_id")));
    assert_eq!(properties["family"].to_string(), fact("cpu family"));
    assert_eq!(properties["model"].to_string(), fact("model"));

    let without = json!({"name": "max", "props": {"clflush": false, "sse4.1": false}});
    let changed = qmp.execute(command, ask("full", without));
    let differing: Vec<_> = properties
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, value)| changed["model"]["props"][name.as_str()] != **value)
        .map(|(name, _)| name.as_str())
        .collect();
    // Not every host can give a guest SSE 4.1.
    let switched: Vec<_> = ["clflush", "sse4-1"]
        .into_iter()
        .filter(|name| properties[name] == true)
        .collect();
    assert_eq!(differing, switched);

    // A static expansion says it all, and can be expanded again.
    let fixed = qmp.execute(command, ask("static", json!({"name": "host"})));
    assert_eq!(
        (&fixed["model"]["name"], &fixed["model"]["props"]),
        (&json!("base"), properties)
    );
    assert_eq!(qmp.execute(command, ask("static", fixed["model"].clone())), fixed);

    for (model, text) in [
        (json!({"name": "nope"}), "CPU model 'nope' not found"),
        (
            json!({"name": "max", "props": {"nope": true}}),
            "Property 'max-x86_64-cpu.nope' not found",
        ),
        (
            json!({"name": "max", "props": {"avx2": 7}}),
            "Invalid parameter type for 'avx2', expected: boolean",
        ),
        (json!({}), "Parameter 'model.name' is missing"),
    ] {
        assert_eq!(refused(&mut qmp, command, ask("full", model)), text);
    }
    assert_eq!(
        refused(&mut qmp, command, ask("nope", json!({"name": "max"}))),
        "Parameter 'type' does not accept value 'nope'"
    );
}
