//! Compiles `<process>.json` to the BPF programs that the crate embeds, and refuses data that a reviewer could not
//! follow: a rule without a reason, a mismatch action that is not the one its filter must have.

use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::Path;

/// File, variant of `Process`, and whether it is a helper (with startup and forbidden filters, and told violations).
const PROCESSES: [(&str, &str, bool); 8] = [
    ("supervisor", "Supervisor", false),
    ("opener", "Opener", false),
    ("warden", "Warden", false),
    ("launcher", "Launcher", false),
    ("vcpu-proc", "Vcpu", true),
    ("block-proc", "Block", true),
    ("dump-proc", "Dump", true),
    ("qmp-proc", "Qmp", true),
];

const SECCOMP_RET_TRAP: u32 = 0x0003_0000;
const SECCOMP_RET_USER_NOTIF: u32 = 0x7fc0_0000;
/// BPF_RET | BPF_K.
const BPF_RETURN: u16 = 0x06;

fn main() {
    let mut source = String::new();
    let mut arms = String::new();
    let mut told_apart: BTreeMap<String, u8> = BTreeMap::new();
    for (file, variant, helper) in PROCESSES {
        let path = format!("{file}.json");
        println!("cargo:rerun-if-changed={path}");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let data: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}"));
        let wanted: &[&str] = if helper {
            &["forbidden", "sealed", "startup"]
        } else {
            &["sealed"]
        };
        check(&path, &data, wanted, helper);
        collect_arguments(&data, &mut told_apart);
        let mut programs: HashMap<String, BpfProgram> =
            compile_from_json(text.as_bytes(), TargetArch::x86_64).unwrap_or_else(|error| panic!("{path}: {error}"));
        let mut fields = String::new();
        for filter in ["startup", "sealed", "forbidden"] {
            let mut program = programs.remove(filter).unwrap_or_default();
            if helper && filter == "sealed" {
                for instruction in &mut program {
                    if instruction.code == BPF_RETURN && instruction.k == SECCOMP_RET_TRAP {
                        instruction.k = SECCOMP_RET_USER_NOTIF;
                    }
                }
            }
            let name = format!("{}_{}", file.replace('-', "_"), filter).to_uppercase();
            let _ = writeln!(source, "static {name}: [Instruction; {}] = [", program.len());
            for i in &program {
                let _ = writeln!(
                    source,
                    "    Instruction {{ code: {}, jt: {}, jf: {}, k: {} }},",
                    i.code, i.jt, i.jf, i.k
                );
            }
            let _ = writeln!(source, "];");
            let _ = write!(fields, "{filter}: &{name}, ");
        }
        let _ = writeln!(arms, "        Process::{variant} => Programs {{ {fields} }},");
    }
    let _ = writeln!(
        source,
        "fn programs(process: Process) -> Programs {{\n    match process {{\n{arms}    }}\n}}"
    );
    let _ = writeln!(
        source,
        "static FILTERED_ARGUMENTS: &[(&str, u8)] = &{:?};",
        told_apart.into_iter().collect::<Vec<_>>()
    );
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    std::fs::write(Path::new(&out).join("programs.rs"), source).expect("writing to OUT_DIR");
}

/// Adds which arguments of which calls the rules look at, as bits.
fn collect_arguments(data: &serde_json::Value, all: &mut BTreeMap<String, u8>) {
    let filters = data.as_object().into_iter().flat_map(|filters| filters.values());
    for rule in filters.filter_map(|filter| filter["filter"].as_array()).flatten() {
        for argument in rule["args"].as_array().into_iter().flatten() {
            if let (Some(call), Some(index @ 0..=5)) = (rule["syscall"].as_str(), argument["index"].as_u64()) {
                *all.entry(call.to_owned()).or_default() |= 1 << index;
            }
        }
    }
}

/// Panics, and so fails the build, unless the file has exactly the wanted filters, each with the actions that its kind
/// must have, and every rule has a reason.
fn check(path: &str, data: &serde_json::Value, wanted: &[&str], helper: bool) {
    let filters = data.as_object().unwrap_or_else(|| panic!("{path}: not an object"));
    let mut names: Vec<&str> = filters.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, wanted, "{path}: wrong set of filters");
    for (name, filter) in filters {
        let actions = (filter["mismatch_action"].as_str(), filter["match_action"].as_str());
        let must_be = match (name.as_str(), helper) {
            ("startup", _) | ("sealed", false) => (Some("kill_process"), Some("allow")),
            ("sealed", true) => (Some("trap"), Some("allow")),
            _ => (Some("allow"), Some("kill_process")),
        };
        assert_eq!(actions, must_be, "{path}: {name}: wrong actions");
        for rule in filter["filter"]
            .as_array()
            .unwrap_or_else(|| panic!("{path}: {name}: no rules"))
        {
            let reason = rule["comment"].as_str().unwrap_or("");
            assert!(
                !reason.trim().is_empty(),
                "{path}: {name}: rule without a reason: {rule}"
            );
        }
    }
}
