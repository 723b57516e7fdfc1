//! blkdebug's lists of rules.

use super::reader::Reader;
use crate::graph::error::GraphError;
use ipc::graph::{InjectedError, IoType, SetState};
use nix::errno::Errno;

/// Most rules of one kind.
const MAX_RULES: usize = 256;

/// Largest `align`, bytes: a buffer of block-proc holds one block.
const MAX_ALIGN_BYTES: u64 = 256 << 10;

/// `inject-error`.
pub fn inject_errors(reader: &mut Reader, prefix: &str) -> Result<Vec<InjectedError>, GraphError> {
    list(reader, &format!("{prefix}inject-error"), |reader, at| {
        let event = event(reader, at)?;
        let sector = reader.int(&format!("{at}sector"))?.unwrap_or(-1);
        let iotype = reader.word(
            &format!("{at}iotype"),
            &["read", "write", "write-zeroes", "discard", "flush", "block-status"],
        )?;
        let iotypes = match iotype {
            // QEMU's default: what guests do, not what is asked about the mapping.
            None => vec![
                IoType::Read,
                IoType::Write,
                IoType::WriteZeroes,
                IoType::Discard,
                IoType::Flush,
            ],
            Some("read") => vec![IoType::Read],
            Some("write") => vec![IoType::Write],
            Some("write-zeroes") => vec![IoType::WriteZeroes],
            Some("discard") => vec![IoType::Discard],
            Some("flush") => vec![IoType::Flush],
            Some(_) => vec![IoType::BlockStatus],
        };
        Ok(InjectedError {
            event: (event != "none").then_some(event),
            state: state(reader, &format!("{at}state"))?,
            iotypes,
            errno: errno(reader, &format!("{at}errno"))?,
            offset: u64::try_from(sector)
                .ok()
                .map(|sector| {
                    sector
                        .checked_mul(512)
                        .ok_or_else(|| GraphError::Type(format!("{at}sector"), "a sector of a disk"))
                })
                .transpose()?,
            once: reader.switch(&format!("{at}once"))?.unwrap_or(false),
            immediately: reader.switch(&format!("{at}immediately"))?.unwrap_or(false),
        })
    })
}

/// `set-state`.
pub fn set_states(reader: &mut Reader, prefix: &str) -> Result<Vec<SetState>, GraphError> {
    list(reader, &format!("{prefix}set-state"), |reader, at| {
        let new_state = format!("{at}new_state");
        Ok(SetState {
            event: event(reader, at)?,
            state: state(reader, &format!("{at}state"))?,
            new_state: state(reader, &new_state)?.ok_or(GraphError::Missing(new_state))?,
        })
    })
}

/// `align`, and what there is not.
pub fn rest(reader: &mut Reader, prefix: &str) -> Result<Option<u32>, GraphError> {
    if reader.text(&format!("{prefix}config"))?.is_some() {
        return Err(GraphError::Unsupported(
            "blkdebug reads no 'config' file: rules are given as 'inject-error' and 'set-state'",
        ));
    }
    let Some(align) = reader.size(&format!("{prefix}align"))? else {
        return Ok(None);
    };
    let fits = align.is_power_of_two() && align <= MAX_ALIGN_BYTES;
    u32::try_from(align)
        .ok()
        .filter(|_| fits)
        .map(Some)
        .ok_or(GraphError::Unsupported(
            "Cannot meet constraints with align: it is a power of two, at most 256 KiB",
        ))
}

fn list<T>(
    reader: &mut Reader,
    name: &str,
    item: impl Fn(&mut Reader, &str) -> Result<T, GraphError>,
) -> Result<Vec<T>, GraphError> {
    let mut items = Vec::new();
    loop {
        let at = format!("{name}.{}.", items.len());
        if !reader.has_below(&at) {
            return Ok(items);
        }
        if items.len() == MAX_RULES {
            return Err(GraphError::Impossible(name.to_owned(), "it has too many items"));
        }
        items.push(item(reader, &at)?);
    }
}

/// A driver's event. The words are QMP's, which qmp-proc has checked; a strange one never happens.
fn event(reader: &mut Reader, at: &str) -> Result<String, GraphError> {
    let name = format!("{at}event");
    reader.text(&name)?.ok_or(GraphError::Missing(name))
}

/// blkdebug's states; 0 is any.
fn state(reader: &mut Reader, name: &str) -> Result<Option<u32>, GraphError> {
    let Some(state) = reader.size(name)? else {
        return Ok(None);
    };
    let state = u32::try_from(state).map_err(|_| GraphError::Type(name.to_owned(), "a state"))?;
    Ok((state != 0).then_some(state))
}

fn errno(reader: &mut Reader, name: &str) -> Result<i32, GraphError> {
    let number = reader.int(name)?.unwrap_or(Errno::EIO as i64);
    i32::try_from(number)
        .ok()
        .filter(|number| (1..4096).contains(number))
        .ok_or_else(|| GraphError::Type(name.to_owned(), "an error number"))
}
