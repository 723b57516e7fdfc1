//! Metadata contexts: what a server says about ranges.

use super::wire::{ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, STATE_DIRTY, STATE_HOLE, STATE_ZERO};
use crate::bitmaps::{EndOfUse, SharedBitmap};
use crate::node::{ExtentKind, Node};
use ipc::Failure;
use nix::errno::Errno;
use std::rc::Rc;

/// Most extents of one answer: a client asks again for the rest.
pub const MAX_EXTENTS: usize = 4096;

/// What is dirty, in runs.
pub trait DirtyContext {
    /// The run at `offset`: where it ends, at `end` at the latest, and whether it is dirty.
    fn run(&self, offset: u64, end: u64) -> (u64, bool);
}

/// A dirty bitmap as long as it is exported: its bits stay as they are, and nobody else works with it.
pub struct InUse(SharedBitmap);

impl InUse {
    /// Begins to use it.
    ///
    /// # Errors
    /// When somebody else works with it.
    pub fn new(bitmap: SharedBitmap) -> Result<Self, Failure> {
        bitmap.borrow_mut().begin_use()?;
        Ok(Self(bitmap))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.borrow_mut().end_use(EndOfUse::Keep);
    }
}

impl DirtyContext for InUse {
    fn run(&self, offset: u64, end: u64) -> (u64, bool) {
        let bitmap = self.0.borrow();
        let bits = bitmap.bits();
        if bits.is_dirty(offset) {
            return (bits.next_clean(offset).clamp(offset + 1, end), true);
        }
        match bits.next(offset, 1) {
            Some(dirty) if dirty.start < end => (dirty.start.max(offset + 1), false),
            _ => (end, false),
        }
    }
}

/// One that a client can choose.
#[derive(Clone)]
pub enum Context {
    /// `base:allocation`.
    Allocation,
    /// `qemu:allocation-depth`.
    Depth,
    /// `qemu:dirty-bitmap:NAME`.
    Dirty(String, Rc<dyn DirtyContext>),
}

impl Context {
    /// Its name.
    pub fn name(&self) -> String {
        match self {
            Self::Allocation => BASE_ALLOCATION.to_owned(),
            Self::Depth => ALLOCATION_DEPTH.to_owned(),
            Self::Dirty(name, _) => format!("{DIRTY_BITMAP}{name}"),
        }
    }

    /// What is at the beginning of a range: lengths and flags, neighbours being different.
    ///
    /// # Errors
    /// The node's.
    pub async fn extents(&self, node: &dyn Node, offset: u64, end: u64, one: bool) -> Result<Vec<(u32, u32)>, Errno> {
        let most = if one { 1 } else { MAX_EXTENTS };
        let mut extents: Vec<(u32, u32)> = Vec::new();
        let mut at = offset;
        while at < end {
            let (next, flags) = match self {
                Self::Dirty(_, dirty) => {
                    let (next, is_dirty) = dirty.run(at, end);
                    (next, if is_dirty { STATE_DIRTY } else { 0 })
                }
                Self::Allocation | Self::Depth => {
                    let found = status_above(node, at, end - at).await?;
                    let flags = match self {
                        Self::Depth => found.depth,
                        _ if found.is_zero => STATE_HOLE | STATE_ZERO,
                        _ => 0,
                    };
                    (at + found.bytes, flags)
                }
            };
            // A request has at most u32::MAX bytes, and so has a part of it.
            let bytes = u32::try_from(next - at).map_err(|_| Errno::EOVERFLOW)?;
            at = next;
            let count = extents.len();
            match extents.last_mut() {
                Some((length, last)) if *last == flags => *length += bytes,
                _ if count == most => break,
                _ => extents.push((bytes, flags)),
            }
        }
        Ok(extents)
    }
}

/// What a range reads as, whatever image of the chain it comes from.
struct Above {
    bytes: u64,
    is_zero: bool,
    /// Which image has it: 1 is the uppermost; 0: none has.
    depth: u32,
}

async fn status_above(node: &dyn Node, offset: u64, bytes: u64) -> Result<Above, Errno> {
    let mut found = node.status(offset, bytes).await?;
    let mut below = node.below();
    let mut depth = 1;
    while found.kind == ExtentKind::Unallocated {
        let Some(lower) = below.filter(|lower| offset < lower.bytes()) else {
            return Ok(Above {
                bytes: found.bytes,
                is_zero: true,
                depth: 0,
            });
        };
        let inside = found.bytes.min(lower.bytes() - offset);
        found = lower.status(offset, inside).await?;
        below = lower.below();
        depth += 1;
    }
    Ok(Above {
        bytes: found.bytes,
        is_zero: found.kind == ExtentKind::Zero,
        depth,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Executor;
    use crate::executor::timer::Timers;
    use crate::node::null::NullNode;
    use proptest::prelude::*;
    use std::time::Duration;

    /// Every other block of so many bytes is dirty.
    struct Stripes(u64);

    impl DirtyContext for Stripes {
        fn run(&self, offset: u64, end: u64) -> (u64, bool) {
            let block = offset / self.0;
            (((block + 1) * self.0).min(end), block % 2 == 1)
        }
    }

    fn extents(context: Context, offset: u64, end: u64, one: bool) -> Vec<(u32, u32)> {
        let node = NullNode::new(1 << 40, Duration::ZERO, true, Rc::new(Timers::default()));
        let mut executor = Executor::default();
        executor.spawn(async move { context.extents(&node, offset, end, one).await });
        let mut finished = Vec::new();
        executor.run(&mut finished);
        finished.remove(0).unwrap()
    }

    proptest! {
        #[test]
        fn extents_cover_a_range_in_order(block in 1u64..5000, offset in 0u64..10_000, bytes in 1u64..100_000) {
            let found = extents(Context::Dirty("b".into(), Rc::new(Stripes(block))), offset, offset + bytes, false);
            let mut at = offset;
            for (length, flags) in &found {
                prop_assert!(*length > 0);
                for byte in [at, at + u64::from(*length) - 1] {
                    prop_assert_eq!(u64::from(*flags), byte / block % 2);
                }
                at += u64::from(*length);
            }
            prop_assert!(at == offset + bytes || found.len() == MAX_EXTENTS);
            prop_assert!(found.windows(2).all(|pair| pair[0].1 != pair[1].1));
        }
    }

    #[test]
    fn one_extent_is_all_of_its_kind() {
        assert_eq!(extents(Context::Allocation, 5, 1 << 31, true), [((1 << 31) - 5, 3)]);
        assert_eq!(extents(Context::Depth, 0, 512, true), [(512, 1)]);
        let stripes = Context::Dirty("b".into(), Rc::new(Stripes(100)));
        assert_eq!(stripes.name(), "qemu:dirty-bitmap:b");
        assert_eq!(extents(stripes, 50, 1000, true), [(50, 0)]);
    }
}
