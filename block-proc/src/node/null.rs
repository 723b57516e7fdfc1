//! `null-co` and `null-aio`: a disk without anything behind it. Writes vanish; reads yield zeroes if wanted, otherwise they
//! leave the memory as it is.

use super::{Extent, ExtentKind, Node, NodeFuture};
use crate::buffer::Segments;
use crate::executor::timer::Timers;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// See the module.
pub struct NullNode {
    bytes: u64,
    latency: Duration,
    read_zeroes: bool,
    timers: Rc<Timers>,
}

impl NullNode {
    /// A node of this size; every request takes `latency`.
    pub fn new(bytes: u64, latency: Duration, read_zeroes: bool, timers: Rc<Timers>) -> Self {
        Self {
            bytes,
            latency,
            read_zeroes,
            timers,
        }
    }

    fn wait(&self) -> NodeFuture<'_> {
        Box::pin(async move {
            if !self.latency.is_zero() {
                self.timers.sleep_until(Instant::now() + self.latency).await;
            }
            Ok(())
        })
    }
}

impl Node for NullNode {
    fn read(&self, _offset: u64, into: Segments) -> NodeFuture<'_> {
        if self.read_zeroes {
            into.fill_zeroes();
        }
        self.wait()
    }

    fn write(&self, _offset: u64, _from: Segments, _durable: bool) -> NodeFuture<'_> {
        self.wait()
    }

    fn write_zeroes(&self, _offset: u64, _bytes: u64, _may_unmap: bool) -> NodeFuture<'_> {
        self.wait()
    }

    fn discard(&self, _offset: u64, _bytes: u64) -> NodeFuture<'_> {
        self.wait()
    }

    fn flush(&self) -> NodeFuture<'_> {
        self.wait()
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn status(&self, _offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        let kind = if self.read_zeroes {
            ExtentKind::Zero
        } else {
            ExtentKind::Data
        };
        Box::pin(async move { Ok(Extent { bytes, kind }) })
    }
}
