//! A process that answers the supervisor with anything.

use super::rng::Rng;
use super::{descriptors, frames, generate};
use ipc::block::{FromBlock, ToBlock};
use ipc::dump::{FromDump, ToDump};
use ipc::launch::PACKET_BYTES;
use ipc::opener::{FromOpener, ToOpener};
use ipc::qmp::{FromQmp, ToQmp};
use ipc::vcpu::{FromVcpu, ToVcpu};
use ipc::{Channel, FromHelper, Message, Request, RequestId};
use nix::errno::Errno;
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd};

/// Something that travels to a process and may want an answer.
pub trait Asks: Message {
    /// The request's number.
    fn id(&self) -> Option<RequestId>;
}

impl<Body> Asks for Request<Body>
where
    Self: Message,
{
    fn id(&self) -> Option<RequestId> {
        Some(self.id)
    }
}

impl Asks for ToQmp {
    fn id(&self) -> Option<RequestId> {
        match self {
            Self::Request(request) => Some(request.id),
            Self::Return { .. } | Self::Event(_) => None,
        }
    }
}

/// Something that may be an answer.
pub trait Answers: Message {
    /// Makes it the answer to this request, if it is an answer at all.
    fn answer_to(&mut self, id: RequestId) -> bool;
}

impl<Reply, Event> Answers for FromHelper<Reply, Event>
where
    Self: Message,
{
    fn answer_to(&mut self, to: RequestId) -> bool {
        match self {
            Self::Reply { id, .. } => {
                *id = to;
                true
            }
            Self::Event(_) => false,
        }
    }
}

impl Answers for FromOpener {
    fn answer_to(&mut self, to: RequestId) -> bool {
        self.id = to;
        true
    }
}

/// What a run counts.
#[derive(Debug, Default, Clone, Copy)]
pub struct Said {
    /// Requests of the supervisor that were read.
    pub requests: u64,
    /// Answers to one of them, of the right type.
    pub answers: u64,
    /// Well-formed messages that nobody waited for.
    pub unasked: u64,
    /// Frames that are almost frames.
    pub malformed: u64,
}

impl std::ops::AddAssign for Said {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.answers += other.answers;
        self.unasked += other.unasked;
        self.malformed += other.malformed;
    }
}

/// A role that is played.
pub trait Player {
    /// Reads what has arrived; false at the channel's end.
    fn read(&mut self) -> bool;
    /// Says something; false when nobody can hear it any more.
    fn say(&mut self, rng: &mut Rng) -> bool;
    /// What has been done so far.
    fn said(&self) -> Said;
}

/// The player of a process of this kind, on its end of the channel, who says something malformed once in so many times.
pub fn player(victim: super::victim::Victim, end: OwnedFd, malformed_once_in: usize) -> Box<dyn Player> {
    use super::victim::Victim;
    match victim {
        Victim::Vcpu => Box::new(Typed::<ToVcpu, FromVcpu>::new(end, malformed_once_in)),
        Victim::Block => Box::new(Typed::<ToBlock, FromBlock>::new(end, malformed_once_in)),
        Victim::Dump => Box::new(Typed::<ToDump, FromDump>::new(end, malformed_once_in)),
        Victim::Qmp => Box::new(Typed::<ToQmp, FromQmp>::new(end, malformed_once_in)),
        Victim::Opener => Box::new(Typed::<ToOpener, FromOpener>::new(end, malformed_once_in)),
        Victim::Launcher => Box::new(Packets {
            end,
            said: Said::default(),
        }),
    }
}

struct Typed<To, From> {
    end: OwnedFd,
    /// Reads on a duplicate of the end.
    requests: Channel<From, To>,
    open: VecDeque<RequestId>,
    malformed_once_in: usize,
    said: Said,
    talk: PhantomData<(To, From)>,
}

impl<To: Asks, From: Answers> Typed<To, From> {
    fn new(end: OwnedFd, malformed_once_in: usize) -> Self {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        // Shared with the process that has it as well, which stands still and will never go on.
        fcntl(&end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("O_NONBLOCK");
        Self {
            requests: Channel::new(end.try_clone().expect("dup")),
            end,
            open: VecDeque::new(),
            malformed_once_in,
            said: Said::default(),
            talk: PhantomData,
        }
    }

    fn send(&self, frames: &[frames::Frame]) -> bool {
        frames.iter().all(|frame| send(&self.end, frame))
    }
}

/// Whether somebody could hear it. A channel that is full at the moment is no end.
fn send(end: &OwnedFd, frame: &frames::Frame) -> bool {
    let fds: Vec<_> = frame.fds.iter().map(AsRawFd::as_raw_fd).collect();
    !matches!(
        frames::send(end, &frame.bytes, &fds),
        Err(Errno::EPIPE | Errno::ECONNRESET)
    )
}

impl<To: Asks, From: Answers> Player for Typed<To, From> {
    fn read(&mut self) -> bool {
        loop {
            match self.requests.recv() {
                Ok(message) => {
                    self.said.requests += 1;
                    self.open.extend(message.id());
                }
                Err(ipc::IpcError::WouldBlock) => return true,
                // What is half read is the real process's.
                Err(ipc::IpcError::Codec(_) | ipc::IpcError::Frame(_) | ipc::IpcError::Fds { .. }) => {}
                Err(_) => return false,
            }
        }
    }

    fn say(&mut self, rng: &mut Rng) -> bool {
        let mut dice = rng.clone();
        rng.any();
        let Some(mut message) = generate::message::<From>(&mut dice, || descriptors::any(rng)) else {
            return true;
        };
        if dice.once_in(self.malformed_once_in) {
            let mut frames = frames::of(message);
            let at = dice.below(frames.len().max(1));
            if let Some(frame) = frames.get_mut(at) {
                frames::mutate(&mut dice, frame);
            }
            self.said.malformed += 1;
            return self.send(&frames);
        }
        // Now and then the answer to a question that was not asked.
        let open = if dice.once_in(40) {
            Some(RequestId(dice.any()))
        } else {
            self.open.front().copied()
        };
        match open {
            Some(id) if message.answer_to(id) => {
                self.open.pop_front();
                self.said.answers += 1;
            }
            // It would be the end at once: only where it is meant.
            None if message.answer_to(RequestId(0)) => return true,
            _ => self.said.unasked += 1,
        }
        self.send(&frames::of(message))
    }

    fn said(&self) -> Said {
        self.said
    }
}

/// The launcher's packets are not framed.
struct Packets {
    end: OwnedFd,
    said: Said,
}

impl Player for Packets {
    fn read(&mut self) -> bool {
        loop {
            match frames::receive(&self.end) {
                Ok(Some(frame)) if frame.bytes.is_empty() => return false,
                Ok(Some(_)) => self.said.requests += 1,
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    fn say(&mut self, rng: &mut Rng) -> bool {
        let mut bytes = vec![0; PACKET_BYTES];
        bytes[..4].copy_from_slice(b"BHLR");
        bytes[4] = rng.below(4) as u8;
        bytes[5] = rng.below(5) as u8;
        for word in bytes[8..20].chunks_exact_mut(4) {
            let number = match rng.below(4) {
                0 => rng.any() as i32,
                1 => i32::MIN,
                2 => std::process::id() as i32,
                _ => rng.below(12) as i32,
            };
            word.copy_from_slice(&number.to_le_bytes());
        }
        let fds = (0..rng.below(3)).map(|_| descriptors::any(rng)).collect();
        let mut frame = frames::Frame { bytes, fds };
        if rng.once_in(4) {
            let at = rng.below(frame.bytes.len());
            frame.bytes[at] = rng.any() as u8;
            frame.bytes.truncate(PACKET_BYTES - rng.below(3));
            self.said.malformed += 1;
        } else {
            self.said.unasked += 1;
        }
        send(&self.end, &frame)
    }

    fn said(&self) -> Said {
        self.said
    }
}
