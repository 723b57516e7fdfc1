//! The supervisor's typed answers as text.

use super::{END, Layout, MemoryLayout, Style};
use ipc::human::{AddressMap, AddressRange, BlockDevice, HumanReply};
use ipc::qmp::{CpuInfoFast, RunState, StatusInfo};
use std::fmt::Write;

mod registers;

/// The text of an answer.
pub fn write(reply: &HumanReply, layout: Layout) -> String {
    match reply {
        HumanReply::Status(status) => format!("VM status: {}{END}", state(status)),
        HumanReply::Name(name) => name
            .name
            .as_ref()
            .map_or_else(String::new, |name| format!("{name}{END}")),
        HumanReply::Uuid(uuid) => format!("{uuid}{END}"),
        HumanReply::Kvm(kvm) => {
            let word = match (kvm.present, kvm.enabled) {
                (true, true) => "enabled",
                (true, false) => "disabled",
                (false, _) => "not compiled",
            };
            format!("kvm support: {word}{END}")
        }
        HumanReply::Cpus(cpus, current) => cpus.iter().map(|cpu| cpu_line(cpu, *current)).collect(),
        HumanReply::Block(devices) => {
            let devices: Vec<_> = devices.iter().map(device).collect();
            devices.join(END)
        }
        HumanReply::MemoryTree(map) => address_map(map),
        HumanReply::Registers(all) => all
            .iter()
            .map(|(number, registers)| format!("{END}CPU#{number}{END}{}", registers::write(registers)))
            .collect(),
        HumanReply::NoSuchCpu => format!("there is no such vCPU{END}"),
        HumanReply::Bytes(bytes) => match layout {
            Layout::Memory(layout) => memory(bytes, layout),
            // An answer to another question than was asked.
            Layout::Plain => String::new(),
        },
        HumanReply::Translated(Some(address)) => format!("gpa: {address:#x}{END}"),
        HumanReply::Done => String::new(),
        HumanReply::Refused(problem) => format!("Error: {problem}{END}"),
        HumanReply::Translated(None) => format!("Unmapped{END}"),
    }
}

/// "running", or "paused" with the reason unless that says no more.
fn state(status: &StatusInfo) -> String {
    match (status.running, status.status) {
        (true, _) => "running".to_owned(),
        (false, RunState::Paused) => "paused".to_owned(),
        (false, state) => format!("paused ({})", word(state)),
    }
}

fn word(state: RunState) -> String {
    match crate::json::ser::to_value(&state) {
        Ok(crate::json::Value::String(word)) => word.into_string(),
        _ => String::new(),
    }
}

fn cpu_line(cpu: &CpuInfoFast, current: i64) -> String {
    let mark = if cpu.cpu_index == current { '*' } else { ' ' };
    format!("{mark} CPU #{}: thread_id={}{END}", cpu.cpu_index, cpu.thread_id)
}

fn device(device: &BlockDevice) -> String {
    let mut text = device.id.clone();
    // Writing to a string does not fail.
    if let Some(node) = &device.node {
        if text.is_empty() {
            text.clone_from(&node.name);
        } else {
            let _ = write!(text, " ({})", node.name);
        }
        let read_only = if node.read_only { ", read-only" } else { "" };
        let _ = write!(text, ": {} ({}{read_only}){END}", node.file, node.driver);
    } else {
        let _ = write!(text, ": [not inserted]{END}");
    }
    if let Some(qdev) = &device.qdev {
        let _ = write!(text, "    Attached to:      {qdev}{END}");
    }
    if let Some(node) = &device.node {
        let mode = if device.write_back { "writeback" } else { "writethrough" };
        let direct = if node.direct { ", direct" } else { "" };
        let no_flush = if node.no_flush { ", ignore flushes" } else { "" };
        let _ = write!(text, "    Cache mode:       {mode}{direct}{no_flush}{END}");
        if let Some(word) = &node.detect_zeroes {
            let _ = write!(text, "    Detect zeroes:    {word}{END}");
        }
        if let Some((file, depth)) = &node.backing {
            let _ = write!(text, "    Backing file:     {file} (chain depth: {depth}){END}");
        }
    }
    text
}

/// One flat view for memory and one for ports.
fn address_map(map: &AddressMap) -> String {
    let view = |number, space: &str, root: &str, ranges: &[AddressRange]| {
        let lines: String = ranges.iter().map(range).collect();
        format!("FlatView #{number}{END} AS \"{space}\", root: {root}{END} Root memory region: {root}{END}{lines}{END}")
    };
    view(0, "memory", "system", &map.memory) + &view(1, "I/O", "io", &map.ports)
}

fn range(range: &AddressRange) -> String {
    let kind = if range.is_ram { "ram" } else { "i/o" };
    let offset = if range.offset == 0 {
        String::new()
    } else {
        format!(" @{:016x}", range.offset)
    };
    let AddressRange { first, last, name, .. } = range;
    format!("  {first:016x}-{last:016x} (prio 0, {kind}): {name}{offset}{END}")
}

/// Lines of 16 bytes (8 of single bytes) with their address. The first line that is not all there is an error and the last.
fn memory(bytes: &[u8], layout: MemoryLayout) -> String {
    let MemoryLayout {
        address,
        count,
        style,
        item_bytes,
    } = layout;
    let item_bytes = item_bytes.max(1) as usize;
    let line_bytes = if item_bytes == 1 { 8 } else { 16 };
    let wanted = count as usize * item_bytes;
    let mut text = String::new();
    for start in (0..wanted).step_by(line_bytes) {
        let end = wanted.min(start + line_bytes);
        let address = address.wrapping_add(start as u64);
        let _ = write!(text, "{address:016x}:");
        match bytes.get(start..end) {
            Some(line) => {
                for item in line.chunks_exact(item_bytes) {
                    text.push(' ');
                    text += &number(item, style);
                }
                text += END;
            }
            None => {
                text += " Cannot access memory";
                text += END;
                break;
            }
        }
    }
    text
}

/// An item, little-endian, as wide as the largest of its size.
fn number(item: &[u8], style: Style) -> String {
    let mut word = [0; 8];
    word[..item.len()].copy_from_slice(item);
    let value = u64::from_le_bytes(word);
    let bits = 8 * item.len();
    let decimal_digits = (bits * 10).div_ceil(33);
    match style {
        Style::Hexadecimal => format!("0x{value:0width$x}", width = bits / 4),
        Style::Octal => {
            let digits = if value == 0 {
                "0".to_owned()
            } else {
                format!("0{value:o}")
            };
            format!("{digits:>width$}", width = bits.div_ceil(3))
        }
        // Only the widest items have a sign: the others are extended with zeros.
        Style::Signed => format!("{:decimal_digits$}", value.cast_signed()),
        Style::Unsigned => format!("{value:decimal_digits$}"),
        Style::Character => match u8::try_from(value) {
            Ok(b'\'') => "'\\''".to_owned(),
            Ok(b'\\') => "'\\\\'".to_owned(),
            Ok(b'\n') => "'\\n'".to_owned(),
            Ok(b'\r') => "'\\r'".to_owned(),
            Ok(byte @ 32..=126) => format!("'{}'", char::from(byte)),
            _ => format!("'\\x{value:02x}'"),
        },
    }
}

#[cfg(test)]
#[path = "text_test.rs"]
mod tests;
