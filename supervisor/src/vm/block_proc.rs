//! block-proc as the rest of the machine finds it: there, not there yet, or about to come back.
//!
//! Where it ends by itself, [`super::restart`] brings another one up. Whoever asks something meanwhile waits, but for those
//! who change the graph: the next block-proc is built from the description, which waits for them.

use super::devices::DeviceQueues;
use crate::helper::{Block, Helper, HelperError};
use ipc::block::{BlockReply, BlockRequest, RngLimit};
use ipc::caps::{InflightFd, RngSourceFd};
use ipc::message::Failure;
use ipc::virtio::{Activation, ActivationNumber, DeviceIdentity, DeviceIndex};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

/// How far it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stage {
    /// Nothing has needed it.
    #[default]
    Absent,
    /// It comes up for the first time: if it ends, the machine does.
    Starting,
    /// It serves.
    Serving,
    /// It has ended. The graph's description may still change; the next one waits for that.
    Lost,
    /// The next one is being told what there is.
    Rebuilding,
    /// It has ended too often: there will be none any more.
    GivenUp,
}

/// See the module.
pub struct BlockProc {
    helper: RefCell<Option<Rc<Helper<Block>>>>,
    stage: Cell<Stage>,
    /// Where the one that is there shows that nothing of it is left.
    fence: RefCell<Option<OwnedFd>>,
    /// Those of dead ones for which the kernel may still be at work.
    fences: RefCell<Vec<OwnedFd>>,
    /// The queues' eventfds.
    pub(super) queues: RefCell<Vec<DeviceQueues>>,
    /// The record of requests under way, and its size in bytes.
    pub(super) inflight: (InflightFd, u64),
    /// The sources of virtio-rng devices.
    pub(super) rng_sources: RefCell<BTreeMap<DeviceIndex, (RngSourceFd, RngLimit)>>,
    /// What the driver of each device sees of it.
    pub(super) shown: RefCell<BTreeMap<DeviceIndex, DeviceIdentity>>,
    /// What the drivers of active devices have programmed.
    active: RefCell<BTreeMap<DeviceIndex, (ActivationNumber, Activation)>>,
    last_activation: Cell<u64>,
}

impl BlockProc {
    /// None yet.
    pub fn new(inflight: InflightFd, inflight_bytes: u64) -> Self {
        Self {
            helper: RefCell::default(),
            stage: Cell::default(),
            fence: RefCell::default(),
            fences: RefCell::default(),
            queues: RefCell::default(),
            inflight: (inflight, inflight_bytes),
            rng_sources: RefCell::default(),
            shown: RefCell::default(),
            active: RefCell::default(),
            last_activation: Cell::new(0),
        }
    }

    /// The process, whatever it is doing.
    pub fn get(&self) -> Option<Rc<Helper<Block>>> {
        self.helper.borrow().clone()
    }

    /// How far it is.
    pub fn stage(&self) -> Stage {
        self.stage.get()
    }

    /// It is so far now.
    pub fn set_stage(&self, stage: Stage) {
        self.stage.set(stage);
        if stage == Stage::GivenUp {
            self.helper.take();
        }
    }

    /// Another one has been started, with the other end of this fence.
    pub fn started(&self, helper: Rc<Helper<Block>>, fence: OwnedFd) {
        self.helper.replace(Some(helper));
        self.fence.replace(Some(fence));
    }

    /// The one that was there has ended.
    pub fn ended(&self) {
        self.fences.borrow_mut().extend(self.fence.take());
    }

    /// What tells of dead ones: each hangs up when nothing of its process is left.
    pub fn fences(&self) -> std::cell::Ref<'_, Vec<OwnedFd>> {
        self.fences.borrow()
    }

    /// A fence has hung up.
    pub fn fence_is_down(&self, place: usize) {
        let mut fences = self.fences.borrow_mut();
        if place < fences.len() {
            fences.remove(place);
        }
    }

    /// Waits until nothing of dead ones is left: no request of theirs reaches a file any more.
    pub async fn fences_down(&self) {
        poll_fn(|_| match self.fences.borrow().is_empty() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }

    /// Waits for the next one where one is on its way. Nothing where there is none.
    pub async fn serving(&self) -> Option<Rc<Helper<Block>>> {
        poll_fn(|_| match self.stage.get() {
            Stage::Lost | Stage::Rebuilding => Poll::Pending,
            Stage::Absent | Stage::GivenUp => Poll::Ready(None),
            Stage::Starting | Stage::Serving => Poll::Ready(self.get()),
        })
        .await
    }

    /// Asks, and asks the next one if this one ends meanwhile. Nothing where there is none (any more), or nothing to ask for
    /// any more.
    pub async fn ask_surely(
        &self,
        deadline: Duration,
        request: impl Fn() -> Option<BlockRequest>,
    ) -> Option<Result<BlockReply, Failure>> {
        loop {
            let helper = self.serving().await?;
            match helper.ask_within(deadline, request()?).await {
                Ok(reply) => return Some(Ok(reply)),
                Err(HelperError::Failed(failure)) => return Some(Err(failure)),
                // Its end ends the machine, or another one comes.
                Err(HelperError::Gone(_)) if self.stage.get() == Stage::Starting => return None,
                Err(HelperError::Gone(_)) => {}
            }
        }
    }

    /// A driver has got ready.
    pub fn activated(&self, device: DeviceIndex, activation: Activation) -> ActivationNumber {
        let number = ActivationNumber(self.last_activation.get() + 1);
        self.last_activation.set(number.0);
        self.active.borrow_mut().insert(device, (number, activation));
        number
    }

    /// A driver is gone.
    pub fn deactivated(&self, device: DeviceIndex) {
        self.active.borrow_mut().remove(&device);
    }

    /// Whether a device is active under this number.
    pub fn is_active(&self, device: DeviceIndex, number: ActivationNumber) -> bool {
        let active = self.active.borrow();
        active.get(&device).is_some_and(|(active, _)| *active == number)
    }

    /// The drivers that are there, with what they have programmed.
    pub fn active(&self) -> BTreeMap<DeviceIndex, (ActivationNumber, Activation)> {
        self.active.borrow().clone()
    }
}
