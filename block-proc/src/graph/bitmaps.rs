//! The dirty bitmaps of a thread's nodes: what is done to them is checked as a whole, then done as a whole.

use super::Graph;
use super::driver::Driver;
use crate::bitmap::Bitmap;
use crate::bitmaps::{DirtyBitmap, SharedBitmap, check_size};
use crate::node::qcow2::Qcow2Node;
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

/// A bitmap that an image keeps.
pub struct InImage {
    image: Rc<Qcow2Node>,
    name: String,
    removes: bool,
}

impl InImage {
    /// Has it marked as not up to date, or taken out.
    ///
    /// # Errors
    /// The image's.
    pub async fn tell(self) -> Result<(), Failure> {
        let told = if self.removes {
            self.image.remove_bitmap(&self.name).await
        } else {
            self.image.outdate_bitmap(&self.name).await
        };
        told.map_err(|errno| Failure {
            message: format!("the image of the bitmap cannot be changed: {}", errno.desc()),
            errno: Some(errno as i32),
        })
    }
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

    /// What images must be told before it is so.
    pub fn images_of_bitmaps(&self, actions: &[BitmapAction]) -> Vec<InImage> {
        let mut found = Vec::new();
        for action in actions {
            let (number, removes) = match action {
                BitmapAction::Add { .. } | BitmapAction::Forget(_) => continue,
                BitmapAction::Remove(number) => (number, true),
                BitmapAction::Clear(number)
                | BitmapAction::Restore(number)
                | BitmapAction::SetEnabled(number, _)
                | BitmapAction::Merge { into: number, .. } => (number, false),
            };
            let Some(member) = self.bitmaps.get(number) else {
                continue;
            };
            let name = member.bitmap.borrow().persistent().map(str::to_owned);
            if let (Some(name), Ok(image)) = (name, self.qcow2(member.node)) {
                found.push(InImage { image, name, removes });
            }
        }
        found
    }

    /// The images that may have bitmaps to store.
    pub fn images(&self) -> Vec<(NodeId, Rc<Qcow2Node>)> {
        let image = |(node, member): (&NodeId, &super::Member)| match &member.driver {
            Driver::Qcow2(image) if !member.read_only => Some((*node, image.clone())),
            _ => None,
        };
        self.members.iter().filter_map(image).collect()
    }

    /// A bitmap that the image on a node has, and that has no number yet.
    fn unnumbered(&self, node: NodeId, name: Option<&str>) -> Option<SharedBitmap> {
        let found = self.qcow2(node).ok()?.bitmap(name?)?;
        let has_number = self.bitmaps.values().any(|member| Rc::ptr_eq(&member.bitmap, &found));
        (!has_number).then_some(found)
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
                    persistent,
                    ..
                } => {
                    let bytes = self.target(*node)?.node().bytes();
                    if let Some(found) = self.unnumbered(*node, persistent.as_deref()) {
                        let usable = found.borrow().check_free();
                        if all.insert(*bitmap, Known { bytes, usable }).is_some() {
                            return Err(Failure::new(format!("bitmap {} exists already", bitmap.0)));
                        }
                        continue;
                    }
                    if let Some(name) = persistent {
                        self.qcow2(*node)?.check_new_bitmap(name).map_err(Failure::new)?;
                    }
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
                BitmapAction::Forget(number) => drop(find(&all, *number)?),
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
                BitmapAction::Forget(number) => self.existing(*number)?.borrow_mut().forget_before(),
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
        if let Some(bitmap) = self.unnumbered(*node, persistent.as_deref()) {
            // It is on the node since the image is open.
            self.bitmaps.insert(*number, Member { node: *node, bitmap });
            return Ok(());
        }
        let bytes = self.target(*node)?.node().bytes();
        let granularity = u64::from(*granularity);
        let bitmap = if *lost {
            DirtyBitmap::inconsistent(bytes, granularity, persistent.clone())
        } else {
            DirtyBitmap::new(Bitmap::new(bytes, granularity), !disabled, persistent.clone())
        };
        let bitmap: SharedBitmap = Rc::new(bitmap.into());
        self.watch(*node)?.bitmaps().borrow_mut().push(bitmap.clone());
        if persistent.is_some() {
            self.qcow2(*node)?.keep_bitmap(bitmap.clone());
        }
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
        if let Ok(image) = self.qcow2(node) {
            image.forget_bitmap(bitmap);
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
