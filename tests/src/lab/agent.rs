//! The host's end of the wire to the lab's agent.

use super::site::Output;
use super::wire::{FromAgent, MAX_PAYLOAD, ToAgent, User, receive, send};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long one file operation may take.
const FILE_DEADLINE: Duration = Duration::from_secs(60);

type Answer = (FromAgent, Vec<u8>);

/// The agent. Usable from several threads.
#[derive(Clone)]
pub(super) struct Agent(Arc<Shared>);

struct Shared {
    to_lab: Mutex<UnixStream>,
    /// Who waits for what; empty once the lab is gone.
    waiting: Mutex<HashMap<u32, Sender<Answer>>>,
    next_id: AtomicU32,
}

impl Agent {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        let mut from_lab = stream.try_clone()?;
        let shared = Arc::new(Shared {
            to_lab: Mutex::new(stream),
            waiting: Mutex::default(),
            next_id: AtomicU32::new(1),
        });
        let dispatch = shared.clone();
        std::thread::spawn(move || {
            while let Ok(Some((header, payload))) = receive::<FromAgent>(&mut from_lab) {
                let id = match &header {
                    FromAgent::Started { id, .. }
                    | FromAgent::Ended { id, .. }
                    | FromAgent::Done { id }
                    | FromAgent::Content { id, .. }
                    | FromAgent::Failed { id, .. }
                    | FromAgent::Data { id } => *id,
                };
                let waiting = dispatch.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(sender) = waiting.get(&id) {
                    // Whoever waited may have given up.
                    let _ = sender.send((header, payload));
                }
            }
            // Everybody who still waits learns that the lab is gone.
            dispatch.waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
        });
        Ok(Self(shared))
    }

    pub(super) fn start(&self, script: &str, user: User) -> Result<LabJob, String> {
        let (id, answers) = self.open();
        let script = script.to_owned();
        let job = LabJob {
            agent: self.clone(),
            id,
            answers,
            ended: None.into(),
        };
        self.send(&ToAgent::Run { id, script, user }, &[])?;
        match job.answers.recv() {
            Ok((FromAgent::Started { .. }, _)) => Ok(job),
            Ok((FromAgent::Failed { error, .. }, _)) => Err(error),
            Ok((other, _)) => Err(format!("the agent answers {other:?}")),
            Err(_) => Err("the lab ended".into()),
        }
    }

    pub(super) fn connect(&self, path: &str) -> Result<UnixStream, String> {
        let (id, answers) = self.open();
        self.send(
            &ToAgent::Connect {
                id,
                path: path.to_owned(),
            },
            &[],
        )?;
        match answers.recv_timeout(FILE_DEADLINE) {
            Ok((FromAgent::Done { .. }, _)) => {}
            Ok((FromAgent::Failed { error, .. }, _)) => {
                self.close(id);
                return Err(format!("{path}: {error}"));
            }
            other => return Err(format!("{path}: {other:?}")),
        }
        let (ours, theirs) = UnixStream::pair().map_err(|error| format!("socketpair: {error}"))?;
        let mut out = ours.try_clone().map_err(|error| format!("dup: {error}"))?;
        let agent = self.clone();
        std::thread::spawn(move || {
            while let Ok((FromAgent::Data { .. }, bytes)) = answers.recv() {
                if bytes.is_empty() || out.write_all(&bytes).is_err() {
                    break;
                }
            }
            let _ = out.shutdown(Shutdown::Write);
            agent.close(id);
        });
        let (agent, mut input) = (self.clone(), ours);
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let length = input.read(&mut buffer).unwrap_or(0);
                let sent = agent.send(&ToAgent::Data { id }, &buffer[..length]);
                if length == 0 || sent.is_err() {
                    return;
                }
            }
        });
        Ok(theirs)
    }

    pub(super) fn put(&self, from: &Path, to: &str, mode: u32) -> Result<(), String> {
        let describe = |error: io::Error| format!("{}: {error}", from.display());
        let file = File::open(from).map_err(describe)?;
        let size = file.metadata().map_err(describe)?.len();
        let mut buffer = vec![0; MAX_PAYLOAD];
        let request = |offset: u64, content: &[u8]| {
            let path = to.to_owned();
            self.ask(content, |id| ToAgent::Write {
                id,
                path,
                offset,
                mode,
                size: Some(size),
            })
        };
        request(0, &[])?;
        let mut offset = 0;
        while offset < size {
            let length = file.read_at(&mut buffer, offset).map_err(describe)?;
            if length == 0 {
                break;
            }
            if buffer[..length].iter().any(|&byte| byte != 0) {
                request(offset, &buffer[..length])?;
            }
            offset += length as u64;
        }
        Ok(())
    }

    pub(super) fn get(&self, from: &str, to: &Path) -> Result<(), String> {
        let describe = |error: io::Error| format!("{}: {error}", to.display());
        let file = File::create(to).map_err(describe)?;
        let mut offset = 0;
        loop {
            let path = from.to_owned();
            let (header, content) = self.ask(&[], |id| ToAgent::Read {
                id,
                path,
                offset,
                length: MAX_PAYLOAD as u32,
            })?;
            let FromAgent::Content { size, .. } = header else {
                return Err(format!("{from}: the agent answers {header:?}"));
            };
            if content.iter().any(|&byte| byte != 0) {
                file.write_all_at(&content, offset).map_err(describe)?;
            }
            offset += content.len() as u64;
            if offset >= size || content.is_empty() {
                return file.set_len(size).map_err(describe);
            }
        }
    }

    /// No more requests; the lab ends.
    pub(super) fn hang_up(&self) {
        let stream = self.0.to_lab.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = stream.shutdown(Shutdown::Both);
    }

    fn ask(&self, payload: &[u8], request: impl FnOnce(u32) -> ToAgent) -> Result<Answer, String> {
        let (id, answers) = self.open();
        self.send(&request(id), payload)?;
        let answer = answers.recv_timeout(FILE_DEADLINE);
        self.close(id);
        match answer {
            Ok((FromAgent::Failed { error, .. }, _)) => Err(error),
            Ok(answer) => Ok(answer),
            Err(_) => Err("the lab does not answer".into()),
        }
    }

    fn open(&self) -> (u32, Receiver<Answer>) {
        let id = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = channel();
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.insert(id, sender);
        (id, receiver)
    }

    fn close(&self, id: u32) {
        self.0
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
    }

    fn send(&self, request: &ToAgent, payload: &[u8]) -> Result<(), String> {
        let mut stream = self.0.to_lab.lock().unwrap_or_else(PoisonError::into_inner);
        send(&mut *stream, request, payload).map_err(|error| format!("the lab is gone: {error}"))
    }
}

/// A script that runs in the lab.
pub struct LabJob {
    agent: Agent,
    id: u32,
    answers: Receiver<Answer>,
    ended: std::cell::RefCell<Option<Output>>,
}

impl LabJob {
    pub(super) fn wait(&self, deadline: Duration) -> Result<Output, String> {
        if let Some(output) = &*self.ended.borrow() {
            return Ok(output.clone());
        }
        let until = Instant::now() + deadline;
        let output = match self
            .answers
            .recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            Ok((
                FromAgent::Ended {
                    status, output_length, ..
                },
                payload,
            )) => {
                let (output, errors) = payload.split_at(output_length as usize);
                Output {
                    status,
                    stdout: String::from_utf8_lossy(output).into_owned(),
                    stderr: String::from_utf8_lossy(errors).into_owned(),
                }
            }
            Ok((other, _)) => return Err(format!("the agent answers {other:?}")),
            Err(RecvTimeoutError::Timeout) => return Err(format!("no end within {deadline:?}")),
            Err(RecvTimeoutError::Disconnected) => return Err("the lab ended".into()),
        };
        *self.ended.borrow_mut() = Some(output.clone());
        self.agent.close(self.id);
        Ok(output)
    }

    pub(super) fn signal(&self, signal: i32) {
        // A lab that is gone runs nothing that could be signalled.
        let _ = self.agent.send(&ToAgent::Signal { id: self.id, signal }, &[]);
    }
}

impl Drop for LabJob {
    fn drop(&mut self) {
        if self.ended.borrow().is_none() {
            self.signal(libc::SIGKILL);
            self.agent.close(self.id);
        }
    }
}
