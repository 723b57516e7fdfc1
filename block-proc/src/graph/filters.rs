//! The filters that jobs work with, by what they are.

use super::driver::Driver;
use super::{Graph, wrong_driver};
use crate::bitmap::Bitmap;
use crate::job::copier::{Copier, Options, Order, Target};
use crate::job::layers::whole_chain;
use crate::node::copy_before_write::CopyBeforeWriteNode;
use crate::node::copy_on_read::CopyOnReadNode;
use crate::node::mirror_top::MirrorTopNode;
use ipc::Failure;
use ipc::graph::{ChildRole, CopyBeforeWriteSpec, NodeId};
use std::rc::Rc;

impl Graph {
    /// A `copy-on-read` filter.
    ///
    /// # Errors
    /// When there is no such node, or it is something else.
    pub fn copy_on_read(&self, node: NodeId) -> Result<Rc<CopyOnReadNode>, Failure> {
        match &self.member(node)?.driver {
            Driver::CopyOnRead(filter) => Ok(filter.clone()),
            _ => Err(wrong_driver(node, "a copy-on-read filter")),
        }
    }

    /// A `mirror_top` filter.
    ///
    /// # Errors
    /// As with [`Self::copy_on_read`].
    pub fn mirror_top(&self, node: NodeId) -> Result<Rc<MirrorTopNode>, Failure> {
        match &self.member(node)?.driver {
            Driver::MirrorTop(filter) => Ok(filter.clone()),
            _ => Err(wrong_driver(node, "a mirror's filter")),
        }
    }

    /// A `copy-before-write` filter, the size of its clusters, and its target.
    ///
    /// # Errors
    /// As with [`Self::copy_on_read`].
    pub fn copy_before_write(&self, node: NodeId) -> Result<(Rc<CopyBeforeWriteNode>, u64, NodeId), Failure> {
        let member = self.member(node)?;
        match &member.driver {
            Driver::CopyBeforeWrite(filter, spec) => {
                let target = member.child(ChildRole::Target)?.node;
                Ok((filter.clone(), spec.cluster_bytes.into(), target))
            }
            _ => Err(wrong_driver(node, "a copy-before-write filter")),
        }
    }

    /// Lets the `copy-before-write` filters begin that have come to their places and wait for no job. Nothing may be under
    /// way.
    pub fn begin_snapshots(&self) {
        for (node, member) in &self.members {
            if let Driver::CopyBeforeWrite(filter, spec) = &member.driver
                && !spec.for_job
                && !filter.has_begun()
                && self.is_used(*node)
            {
                self.begin_snapshot(filter, spec);
            }
        }
    }

    fn begin_snapshot(&self, filter: &Rc<CopyBeforeWriteNode>, spec: &CopyBeforeWriteSpec) {
        let mut left = Bitmap::new(filter.child().bytes(), spec.cluster_bytes.into());
        let mut covers = None;
        match spec.bitmap {
            None => left.set(0..left.bytes()),
            Some(number) => {
                // A bitmap that is gone has nothing dirty.
                if let Some(bitmap) = self.bitmap(number) {
                    left.merge(bitmap.borrow().bits());
                }
                covers = Some(left.clone());
            }
        }
        let options = Options {
            order: Order::Keeping,
            leaves_out: true,
            target_reads_zeroes: false,
            unmap: false,
            compress: None,
        };
        let source = filter.child().clone();
        let target = Target::Node(filter.target().clone());
        let copier = Copier::new(source.clone(), target, whole_chain(source), options, left);
        filter.begin(Rc::new(copier), covers);
    }
}
