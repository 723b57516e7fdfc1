//! What a host with many machines asks for: `-cgroup`, `--metrics`, `--log-format`, `-sandbox uid-base=`.

use super::draft::Draft;
use super::error::UsageError;
use super::given::Given;
use super::keyval::{Keys, Pairs, only, value};
use crate::hosting::cgroup::{CgroupConfig, DEFAULT_PARENT, Group, Knob, Limit};
use crate::launcher::ids::IDS_PER_VM;
use crate::logging::Format;
use std::path::PathBuf;

/// `-sandbox`: QEMU's keys ask for what is so anyway.
pub(super) static SANDBOX: Keys = Keys {
    implied: Some("enable"),
    list: None,
    keys: &[
        only("enable", &["on"], "Bulkhead is always sandboxed"),
        only("obsolete", &["deny", "allow"], "all that is not needed is denied"),
        only(
            "elevateprivileges",
            &["deny", "allow", "children"],
            "all that is not needed is denied",
        ),
        only("spawn", &["deny", "allow"], "all that is not needed is denied"),
        only(
            "resourcecontrol",
            &["deny", "allow"],
            "all that is not needed is denied",
        ),
        value("uid-base"),
    ],
};

/// The first ids are those of accounts, and the kernel has no id -1.
const LOWEST_BASE: u32 = 1000;

/// `-sandbox`.
pub(super) fn sandbox(draft: &mut Draft, pairs: &Pairs) -> Result<(), UsageError> {
    if let Some(given) = pairs.get("uid-base") {
        let base = given.text()?.parse().ok();
        let fits = |base: &u32| {
            *base >= LOWEST_BASE && base.is_multiple_of(IDS_PER_VM) && base.checked_add(IDS_PER_VM).is_some()
        };
        let base = base.filter(fits);
        let problem = format!(
            "this is the first of {IDS_PER_VM} user and group ids of the machine's own, a multiple of {IDS_PER_VM}"
        );
        draft.uid_base = Some(base.ok_or_else(|| given.refuse(problem))?);
    }
    Ok(())
}

/// `--metrics`.
pub(super) fn metrics(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let path = given.text()?.strip_prefix("unix:").filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| given.refuse("this is unix:PATH, a socket that is made there"))?;
    draft.metrics = Some(PathBuf::from(path));
    Ok(())
}

/// `--log-format`.
pub(super) fn log_format(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let text = given.text()?;
    draft.log_format = match (text, text.strip_prefix("journal:")) {
        ("text", _) => Format::Text,
        ("json", _) => Format::Json,
        ("journal", _) => Format::Journal("/run/systemd/journal/socket".into()),
        (_, Some(path)) if !path.is_empty() => Format::Journal(path.into()),
        _ => return Err(given.refuse("this is text, json, journal or journal:PATH")),
    };
    Ok(())
}

/// `-cgroup`: `parent=PATH,GROUP.FILE=VALUE,…`. Each may be left away.
pub(super) fn cgroup(draft: &mut Draft, given: &Given) -> Result<(), UsageError> {
    let mut config = CgroupConfig {
        parent: Some(DEFAULT_PARENT.into()),
        limits: Vec::new(),
    };
    for part in given.text()?.split(',').filter(|part| *part != "on") {
        let Some((key, text)) = part.split_once('=').filter(|(_, text)| !text.is_empty()) else {
            return Err(given.refuse(format!("{part} is not GROUP.FILE=VALUE, as vcpu.cpu.max=50000/100000")));
        };
        match (key, text) {
            ("parent", "self") => config.parent = None,
            ("parent", path) if path.split('/').any(|part| part == "..") => {
                return Err(given.refuse("parent is a path below the root of the control groups, without '..'"));
            }
            ("parent", path) => config.parent = Some(path.into()),
            _ => config.limits.push(limit(given, key, text)?),
        }
    }
    draft.cgroup = Some(config);
    Ok(())
}

fn limit(given: &Given, key: &str, text: &str) -> Result<Limit, UsageError> {
    let (group, file) = key.split_once('.').unwrap_or((key, ""));
    let known = Group::ALL.into_iter().find(|known| known.short_name() == group);
    let group = match (group, known) {
        ("all", _) => None,
        (_, Some(group)) => Some(group),
        _ => {
            let problem = "the group is missing: supervisor, vcpu, block, dump, qmp or all, then a dot";
            return Err(given.refuse(format!("{key}: {problem}")));
        }
    };
    let knob = Knob::ALL.into_iter().find(|knob| knob.name() == file);
    let knob = knob.ok_or_else(|| {
        let all = Knob::ALL.map(Knob::name).join(", ");
        given.refuse(format!("{key}: there are {all}"))
    })?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "/:=.".contains(c);
    if !text.chars().all(plain) {
        return Err(given.refuse(format!("{key}: {text} is no limit; a blank is written /")));
    }
    Ok(Limit {
        group,
        knob,
        value: text.to_owned(),
    })
}
