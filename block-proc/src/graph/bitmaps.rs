//! The dirty bitmaps of a thread's nodes: what is done to them is checked as a whole, then done as a whole.

use super::Graph;
use crate::bitmap::Bitmap;
use crate::bitmaps::{DirtyBitmap, SharedBitmap, check_size};
use ipc::Failure;
use ipc::block_job::{BitmapAction, BitmapNumber, BitmapReport};
use ipc::graph::NodeId;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Smallest and largest granularity, powers of two (QEMU's limits, which are the qcow2 format's).
const GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 9..=31;

/// A bitmap and where it is.
#[derive(Debug, Clone)]
pub(super) struct Member {
    node: NodeId,
    bitmap: SharedBitmap,
}

/// What a check must know of a bitmap that is there, or will be.
struct Known {
    bytes: u64,
    usable: Result<(), Failure>,
}

impl Graph {
    /// A dirty bitmap.
    pub fn bitmap(&self, number: BitmapNumber) -> Option<SharedBitmap> {
        self.bitmaps.get(&number).map(|member| member.bitmap.clone())
    }

    /// What all of them are now.
    pub fn report_bitmaps(&self) -> BTreeMap<BitmapNumber, BitmapReport> {
        let report = |(number, member): (&BitmapNumber, &Member)| (*number, member.bitmap.borrow().report());
        self.bitmaps.iter().map(report).collect()
    }

    /// The nodes whose bitmaps' images must know, before it is so, that they are not up to date any more: with the names.
    pub fn images_of_bitmaps(&self, actions: &[BitmapAction]) -> BTreeMap<NodeId, Vec<String>> {
        let mut images: BTreeMap<NodeId, Vec<String>> = BTreeMap::new();
        for action in actions {
            let number = match action {
                BitmapAction::Add { .. } => continue,
                BitmapAction::Remove(number)
                | BitmapAction::Clear(number)
                | BitmapAction::Restore(number)
                | BitmapAction::SetEnabled(number, _)
                | BitmapAction::Merge { into: number, .. } => number,
            };
            let member = self.bitmaps.get(number);
            let name = member.and_then(|member| Some((member.node, member.bitmap.borrow().persistent()?.to_owned())));
            if let Some((node, name)) = name {
                images.entry(node).or_default().push(name);
            }
        }
        images
    }

    /// Whether all of it is possible, in order.
    ///
    /// # Errors
    /// What is impossible about it.
    pub fn check_bitmaps(&self, actions: &[BitmapAction]) -> Result<(), Failure> {
        let known = |(number, member): (&BitmapNumber, &Member)| {
            let bitmap = member.bitmap.borrow();
            let known = Known {
                bytes: bitmap.bits().bytes(),
                usable: bitmap.check_free(),
            };
            (*number, known)
        };
        let mut all: BTreeMap<BitmapNumber, Known> = self.bitmaps.iter().map(known).collect();
        for action in actions {
            match action {
                BitmapAction::Add {
                    bitmap,
                    node,
                    granularity,
                    ..
                } => {
                    let bytes = self.target(*node)?.node().bytes();
                    let bits = granularity.trailing_zeros();
                    if !granularity.is_power_of_two() || !GRANULARITY_BITS.contains(&bits) {
                        return Err(Failure::new(format!("a bitmap's granularity of {granularity} bytes")));
                    }
                    check_size(bytes, u64::from(*granularity))?;
                    let new = Known { bytes, usable: Ok(()) };
                    if all.insert(*bitmap, new).is_some() {
                        return Err(Failure::new(format!("bitmap {} exists already", bitmap.0)));
                    }
                }
                BitmapAction::Remove(number) => {
                    find(&all, *number)?;
                    // An inconsistent one can be removed, one that a job has cannot.
                    if self.bitmap(*number).is_some_and(|bitmap| bitmap.borrow().is_busy()) {
                        return find(&all, *number)?.usable.clone();
                    }
                    all.remove(number);
                }
                BitmapAction::Clear(number) | BitmapAction::Restore(number) | BitmapAction::SetEnabled(number, _) => {
                    find(&all, *number)?.usable.clone()?;
                }
                BitmapAction::Merge { into, from } => {
                    let (into, from) = (find(&all, *into)?, find(&all, *from)?);
                    into.usable.clone()?;
                    from.usable.clone()?;
                    if into.bytes != from.bytes {
                        return Err(Failure::new(format!(
                            "Bitmaps are of different sizes (destination size is {} and source size is {}) and can't be merged",
                            into.bytes, from.bytes
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// Does what was checked. Nothing may be under way.
    ///
    /// # Errors
    /// None, after [`Self::check_bitmaps`].
    pub fn apply_bitmaps(&mut self, actions: &[BitmapAction]) -> Result<(), Failure> {
        let undoes = actions.iter().any(|action| matches!(action, BitmapAction::Restore(_)));
        if !undoes {
            for member in self.bitmaps.values() {
                member.bitmap.borrow_mut().forget_before();
            }
        }
        for action in actions {
            match action {
                BitmapAction::Add { .. } => self.add_bitmap(action)?,
                BitmapAction::Remove(number) => {
                    if let Some(Member { node, bitmap }) = self.bitmaps.remove(number) {
                        self.forget_bitmap(node, &bitmap);
                    }
                }
                BitmapAction::Clear(number) => self.existing(*number)?.borrow_mut().clear(),
                BitmapAction::Restore(number) => self.existing(*number)?.borrow_mut().restore(),
                BitmapAction::SetEnabled(number, enabled) => {
                    self.existing(*number)?.borrow_mut().set_enabled(*enabled);
                }
                BitmapAction::Merge { into, from } => {
                    let from = self.existing(*from)?.borrow().bits().clone();
                    self.existing(*into)?.borrow_mut().merge(&from);
                }
            }
        }
        Ok(())
    }

    fn add_bitmap(&mut self, action: &BitmapAction) -> Result<(), Failure> {
        let BitmapAction::Add {
            bitmap: number,
            node,
            granularity,
            disabled,
            persistent,
            lost,
        } = action
        else {
            return Ok(());
        };
        let bytes = self.target(*node)?.node().bytes();
        let granularity = u64::from(*granularity);
        let bitmap = if *lost {
            DirtyBitmap::inconsistent(bytes, granularity, persistent.clone())
        } else {
            DirtyBitmap::new(Bitmap::new(bytes, granularity), !disabled, persistent.clone())
        };
        let bitmap: SharedBitmap = Rc::new(bitmap.into());
        self.watch(*node)?.bitmaps().borrow_mut().push(bitmap.clone());
        self.bitmaps.insert(*number, Member { node: *node, bitmap });
        Ok(())
    }

    fn existing(&self, number: BitmapNumber) -> Result<SharedBitmap, Failure> {
        self.bitmap(number).ok_or_else(|| missing(number))
    }

    fn forget_bitmap(&self, node: NodeId, bitmap: &SharedBitmap) {
        if let Ok(watch) = self.watch(node) {
            watch.bitmaps().borrow_mut().retain(|other| !Rc::ptr_eq(other, bitmap));
        }
    }

    /// A node is gone, and its bitmaps with it.
    pub(super) fn forget_bitmaps_of(&mut self, node: NodeId) {
        self.bitmaps.retain(|_, member| member.node != node);
    }

    /// Bitmaps follow their nodes' sizes.
    pub fn resize_bitmaps(&self) {
        for (node, member) in &self.members {
            let bitmaps = member.watch.bitmaps().borrow();
            if let (false, Ok(target)) = (bitmaps.is_empty(), self.target(*node)) {
                let bytes = target.node().bytes();
                bitmaps.iter().for_each(|bitmap| bitmap.borrow_mut().resize(bytes));
            }
        }
    }

    /// Checks that the bitmaps of a node can follow it to another size.
    ///
    /// # Errors
    /// When one would need too much memory, or a job works with one.
    pub fn check_bitmaps_size(&self, node: NodeId, bytes: u64) -> Result<(), Failure> {
        let node = self.watch(node)?;
        for bitmap in &*node.bitmaps().borrow() {
            let bitmap = bitmap.borrow();
            if bitmap.is_busy() {
                return bitmap.check_free();
            }
            check_size(bytes, bitmap.bits().granularity())?;
        }
        Ok(())
    }
}

fn find(all: &BTreeMap<BitmapNumber, Known>, number: BitmapNumber) -> Result<&Known, Failure> {
    all.get(&number).ok_or_else(|| missing(number))
}

fn missing(number: BitmapNumber) -> Failure {
    Failure::new(format!("there is no bitmap {}", number.0))
}
