//! What the machine is: `-machine`, `-accel`, `-m`, `-name`, `-uuid`.

use super::Invocation;
use super::draft::Draft;
use super::error::UsageError;
use super::given::Given;
use super::keyval::{Keys, Pairs, only, size, value};
use super::suggest::hint;
use crate::config::{Board, RestartBudget};
use crate::objects::Spec;
use policies::Mode;
use std::time::Duration;

/// Memory without `-m`, bytes: as much as QEMU gives.
pub(super) const DEFAULT_RAM_BYTES: u64 = 128 << 20;
/// A guest image, the tables at the bottom of memory and a stack need some room.
const MIN_RAM_BYTES: u64 = 1 << 20;
/// Guest-physical addresses that every x86-64 host can map, with room for devices above the memory.
const MAX_RAM_BYTES: u64 = 4 << 40;
const PAGE_BYTES: u64 = 4096;

/// `-machine` types: name and what it is. The first is the default.
pub const MACHINES: &[(&str, &str)] = &[
    ("bulkhead", "PCI Express, virtio, one serial port, ACPI"),
    ("q35", "the same machine by the name that QEMU's command lines use"),
    ("none", "no machine: the block graph, objects and QMP alone"),
];

/// Accelerators that QEMU has and Bulkhead has not.
const OTHER_ACCELERATORS: &[&str] = &["tcg", "xen", "hvf", "whpx", "nvmm", "mshv"];

/// `-machine`.
pub(super) static MACHINE_KEYS: Keys = Keys {
    implied: Some("type"),
    list: Some(|| Invocation::ListMachines),
    keys: &[
        value("type"),
        value("accel"),
        value("memory-backend"),
        only("kernel-irqchip", &["on"], "the interrupt controllers are KVM's"),
        only("acpi", &["on"], "the machine is described by ACPI tables"),
        only("usb", &["off"], "the machine has no USB"),
        only("vmport", &["off", "auto"], "the machine has no VMware port"),
        only("smm", &["off"], "the machine has no system management mode"),
        only("hpet", &["off"], "the machine has no HPET"),
        only("sata", &["off"], "the machine has no SATA controller"),
        only("smbus", &["off"], "the machine has no SMBus"),
        only("graphics", &["off"], "the machine has no display"),
        only("nvdimm", &["off"], "the machine has no NVDIMM"),
        only(
            "dump-guest-core",
            &["off"],
            "guest memory never goes into a core dump of the host",
        ),
        only("mem-merge", &["off"], "guest memory is not merged with other guests'"),
    ],
};

/// `-accel`.
pub(super) static ACCEL_KEYS: Keys = Keys {
    implied: Some("accel"),
    list: Some(|| Invocation::ListAccelerators),
    keys: &[
        value("accel"),
        only("kernel-irqchip", &["on"], "the interrupt controllers are KVM's"),
        only("thread", &["multi"], "every vCPU has a thread of its own"),
        only("dirty-ring-size", &["0"], "written pages are tracked in a bitmap"),
    ],
};

/// `-m`.
pub(super) static MEMORY_KEYS: Keys = Keys {
    implied: Some("size"),
    list: None,
    keys: &[
        size("size"),
        size("maxmem"),
        only("slots", &["0"], "memory cannot be added to a running machine"),
    ],
};

/// `-name`.
pub(super) static NAME_KEYS: Keys = Keys {
    implied: Some("guest"),
    list: None,
    keys: &[
        value("guest"),
        only("debug-threads", &["on", "off"], "threads have names in any case"),
    ],
};

pub(super) fn machine(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    if let Some(given) = pairs.get("type") {
        let wanted = given.text()?;
        let names = || MACHINES.iter().map(|(name, _)| *name);
        if !names().any(|name| name == wanted) {
            let all = || format!("; there are {}", names().collect::<Vec<_>>().join(", "));
            let hint = hint(wanted, "", names(), all);
            return Err(given.refuse(format!("there is no such machine{hint}")));
        }
        draft.board = if wanted == "none" { Board::Empty } else { Board::Pc };
    }
    if let Some(given) = pairs.get("memory-backend") {
        draft.memory_backend = Some(given.clone());
    }
    if let Some(given) = pairs.get("accel") {
        // A list: the first that works is taken, so KVM has to come first.
        for (place, name) in given.text()?.split(':').enumerate() {
            accelerator(draft, given, name, place == 0)?;
        }
        draft.accelerator_chosen = true;
    }
    Ok(())
}

pub(super) fn accel(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    let given = pairs.require("accel", "-accel kvm")?;
    // Several -accel are a list, too.
    let is_first = !std::mem::replace(&mut draft.accelerator_chosen, true);
    accelerator(draft, given, given.text()?, is_first)
}

fn accelerator(draft: &mut Draft, given: &Given, name: &str, is_first: bool) -> Result<(), UsageError> {
    match name {
        "kvm" => Ok(()),
        "qtest" => {
            draft.is_qtest |= is_first;
            Ok(())
        }
        other if !OTHER_ACCELERATORS.contains(&other) => {
            Err(given.refuse("there is no such accelerator: Bulkhead needs KVM, -accel kvm"))
        }
        _ if is_first => {
            Err(given.refuse("Bulkhead needs KVM: write -accel kvm ('bulkhead doctor' says whether this host has it)"))
        }
        _ => Ok(()),
    }
}

pub(super) fn memory(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    if let Some(given) = pairs.get("size") {
        let bytes = given.size_bytes()?;
        if bytes < MIN_RAM_BYTES {
            return Err(given.refuse("the machine needs at least 1 MiB of memory"));
        }
        if bytes > MAX_RAM_BYTES {
            return Err(given.refuse("the machine can have at most 4 TiB of memory"));
        }
        draft.ram_bytes = bytes.next_multiple_of(PAGE_BYTES);
    }
    if let Some(given) = pairs.get("maxmem") {
        draft.max_ram = Some((given.clone(), given.size_bytes()?));
    }
    Ok(())
}

/// After the last `-m`: `maxmem` leaves no room above the memory that is there.
pub(super) fn check_max_memory(draft: &Draft) -> Result<(), UsageError> {
    match &draft.max_ram {
        Some((given, bytes)) if bytes.div_ceil(PAGE_BYTES) != draft.ram_bytes / PAGE_BYTES => {
            Err(given.refuse("memory cannot be added to a running machine: leave maxmem away or make it equal to size"))
        }
        _ => Ok(()),
    }
}

/// After the last option: `memory-backend` names an object whose size is the machine's. Returns its id.
pub(super) fn connect_memory(draft: &mut Draft) -> Result<Option<String>, UsageError> {
    let Some(given) = draft.memory_backend.take() else {
        return Ok(None);
    };
    let id = given.text()?;
    let found = draft.objects.iter().find(|(known, _)| known == id);
    let Some((_, Spec::Memory(memory))) = found else {
        return Err(given.refuse(format!("Memory backend '{id}' not found")));
    };
    if !memory.share {
        return Err(given.refuse("guest memory is shared between Bulkhead's processes: the backend needs share=on"));
    }
    if memory.bytes < MIN_RAM_BYTES {
        return Err(given.refuse("the machine needs at least 1 MiB of memory"));
    }
    if draft.ram_bytes != 0 && draft.ram_bytes != memory.bytes {
        return Err(given.refuse("Machine memory size does not match the size of the memory backend"));
    }
    draft.ram_bytes = memory.bytes;
    Ok(Some(id.to_owned()))
}

pub(super) fn name(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    if let Some(given) = pairs.get("guest") {
        let name = given.text()?;
        if name.chars().any(char::is_control) {
            return Err(given.refuse("a name cannot hold control characters: logs show it"));
        }
        draft.name = Some(name.to_owned());
    }
    Ok(())
}

pub(super) fn restart_budget(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let (restarts, seconds) = {
        let text = given.text()?;
        let (restarts, seconds) = text.split_once('/').unwrap_or((text, "60"));
        (
            restarts.parse().ok(),
            seconds.parse().ok().filter(|seconds| *seconds > 0),
        )
    };
    let (Some(restarts), Some(seconds)) = (restarts, seconds) else {
        return Err(given.refuse("this is how many restarts there may be within how many seconds, as in 3/60"));
    };
    draft.restart_budget = RestartBudget {
        restarts,
        period: Duration::from_secs(seconds),
    };
    Ok(())
}

/// `--policy-mode`.
pub(super) fn policy_mode(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    draft.policy_mode = match given.text()? {
        "enforce" => Mode::Enforce,
        "log" => Mode::Log,
        _ => {
            return Err(
                given.refuse("this is enforce, or log: for development, every call that a policy lacks goes on")
            );
        }
    };
    Ok(())
}

/// `-uuid`.
pub(super) fn uuid(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let uuid = given.value.to_str().and_then(parse_uuid);
    let uuid = uuid.ok_or_else(|| given.refuse("a UUID looks like 550e8400-e29b-41d4-a716-446655440000"))?;
    draft.uuid = Some(uuid);
    Ok(())
}

/// 8-4-4-4-12 hexadecimal digits.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let text = text.as_bytes();
    if text.len() != 36 || [8, 13, 18, 23].iter().any(|&at| text[at] != b'-') {
        return None;
    }
    let mut digits = text.iter().enumerate().filter(|(at, _)| ![8, 13, 18, 23].contains(at));
    let mut digit = || {
        char::from(*digits.next()?.1)
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
    };
    let mut uuid = [0; 16];
    for byte in &mut uuid {
        *byte = digit()? << 4 | digit()?;
    }
    Some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_has_exactly_one_form() {
        let bytes = [
            0x55, 0x0e, 0x84, 0, 0xe2, 0x9b, 0x41, 0xd4, 0xa7, 0x16, 0x44, 0x66, 0x55, 0x44, 0, 0xff,
        ];
        assert_eq!(parse_uuid("550e8400-e29b-41d4-a716-4466554400ff"), Some(bytes));
        assert_eq!(parse_uuid("550E8400-E29B-41D4-A716-4466554400FF"), Some(bytes));
        for bad in [
            "",
            "550e8400e29b41d4a7164466554400ff",
            "550e8400-e29b-41d4-a716-4466554400f",
            "550e8400-e29b-41d4-a716-4466554400fg",
            "550e8400-e29b-41d4-a716_4466554400ff",
            "-50e8400-e29b-41d4-a716-4466554400ff",
            "550e8400-e29b-41d4-a716-4466554400é",
        ] {
            assert_eq!(parse_uuid(bad), None, "{bad}");
        }
    }
}
