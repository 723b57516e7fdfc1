//! The lab's agent: runs in the outer system and does what the test on the host asks for (`bulkhead_tests::lab::wire`).
//! It ends when the host hangs up, and the lab with it.

use bulkhead_tests::lab::wire::{FromAgent, MAX_PAYLOAD, ToAgent, User, receive, send};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

/// The lab's ordinary user and the group that may open /dev/kvm, as its /etc/passwd and /etc/group say.
const TESTER: u32 = 1000;
const KVM_GROUP: u32 = 104;

fn main() -> ExitCode {
    let Some(path) = std::env::args().nth(1) else {
        eprintln!("usage: lab-agent PORT");
        return ExitCode::from(2);
    };
    match serve(&path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-agent: {path}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The way back to the host, shared by all threads.
#[derive(Clone)]
struct Host(Arc<Mutex<File>>);

impl Host {
    /// When the host is gone the main loop notices; nobody else needs to.
    fn say(&self, header: &FromAgent, payload: &[u8]) {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = send(&mut *port, header, payload);
    }

    fn answer(&self, id: u32, result: io::Result<()>) {
        match result {
            Ok(()) => self.say(&FromAgent::Done { id }, &[]),
            Err(error) => self.fail(id, &error),
        }
    }

    fn fail(&self, id: u32, error: &io::Error) {
        let error = error.to_string();
        self.say(&FromAgent::Failed { id, error }, &[]);
    }
}

fn serve(path: &str) -> io::Result<()> {
    let mut port = OpenOptions::new().read(true).write(true).open(path)?;
    let host = Host(Arc::new(Mutex::new(port.try_clone()?)));
    let scripts: Arc<Mutex<HashMap<u32, i32>>> = Arc::default();
    let mut connections: HashMap<u32, UnixStream> = HashMap::new();
    while let Some((request, payload)) = receive::<ToAgent>(&mut port)? {
        match request {
            ToAgent::Run { id, script, user } => match start(&script, user) {
                Ok(script) => {
                    let pid = script.child.id();
                    host.say(&FromAgent::Started { id, pid }, &[]);
                    scripts
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .insert(id, pid as i32);
                    let (host, scripts) = (host.clone(), scripts.clone());
                    std::thread::spawn(move || {
                        script.wait(id, &host);
                        scripts.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                    });
                }
                Err(error) => host.fail(id, &error),
            },
            ToAgent::Signal { id, signal } => {
                if let Some(&group) = scripts.lock().unwrap_or_else(PoisonError::into_inner).get(&id) {
                    // SAFETY: kill touches no memory.
                    unsafe { libc::kill(-group, signal) };
                }
            }
            ToAgent::Write {
                id,
                path,
                offset,
                mode,
                size,
            } => host.answer(id, write(&path, offset, mode, size, &payload)),
            ToAgent::Read {
                id,
                path,
                offset,
                length,
            } => match read(&path, offset, length) {
                Ok((size, content)) => host.say(&FromAgent::Content { id, size }, &content),
                Err(error) => host.fail(id, &error),
            },
            ToAgent::Connect { id, path } => {
                let connected = UnixStream::connect(&path).and_then(|stream| Ok((stream.try_clone()?, stream)));
                match connected {
                    Ok((reader, writer)) => {
                        connections.insert(id, writer);
                        host.answer(id, Ok(()));
                        let host = host.clone();
                        std::thread::spawn(move || forward(reader, id, &host));
                    }
                    Err(error) => host.fail(id, &error),
                }
            }
            ToAgent::Data { id } => {
                let Some(connection) = connections.get_mut(&id) else {
                    continue;
                };
                // The peer may have gone; `forward` has told the host then.
                if payload.is_empty() {
                    let _ = connection.shutdown(std::net::Shutdown::Write);
                    connections.remove(&id);
                } else {
                    let _ = connection.write_all(&payload);
                }
            }
        }
    }
    Ok(())
}

/// A script that runs; its output goes to files, so that a daemon it leaves behind keeps nobody waiting.
struct Script {
    child: Child,
    output: File,
    errors: File,
}

fn start(script: &str, user: User) -> io::Result<Script> {
    let output = tempfile::tempfile()?;
    let errors = tempfile::tempfile()?;
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", script])
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(errors.try_clone()?)
        .process_group(0);
    match user {
        User::Root => {
            command.env("HOME", "/root").current_dir("/root");
        }
        User::Tester => {
            command
                .env("HOME", "/home/tester")
                .env("USER", "tester")
                .current_dir("/home/tester");
            let become_tester = || {
                setgroups(&[Gid::from_raw(TESTER), Gid::from_raw(KVM_GROUP)])?;
                setgid(Gid::from_raw(TESTER))?;
                setuid(Uid::from_raw(TESTER))?;
                Ok(())
            };
            // SAFETY: between fork and exec only system calls are made; glibc's setuid and its kin broadcast to other
            // threads, of which the child has none.
            unsafe { command.pre_exec(become_tester) };
        }
    }
    let child = command.spawn()?;
    Ok(Script { child, output, errors })
}

impl Script {
    fn wait(mut self, id: u32, host: &Host) {
        let status = match self.child.wait() {
            Ok(status) => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            Err(error) => return host.fail(id, &error),
        };
        let mut payload = contents(&mut self.output);
        let output_length = payload.len() as u32;
        payload.extend(contents(&mut self.errors));
        host.say(
            &FromAgent::Ended {
                id,
                status,
                output_length,
            },
            &payload,
        );
    }
}

fn contents(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut bytes));
    bytes
}

fn write(path: &str, offset: u64, mode: u32, size: Option<u64>, content: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(mode)
        .open(path)?;
    if let Some(size) = size {
        file.set_len(size)?;
    }
    file.write_all_at(content, offset)
}

fn read(path: &str, offset: u64, length: u32) -> io::Result<(u64, Vec<u8>)> {
    let mut file = File::open(path)?;
    // A block device has no size in its metadata; its end can be sought.
    let size = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(offset))?;
    let mut content = Vec::new();
    file.take(u64::from(length).min(MAX_PAYLOAD as u64))
        .read_to_end(&mut content)?;
    Ok((size, content))
}

fn forward(mut from: UnixStream, id: u32, host: &Host) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut buffer).unwrap_or(0);
        host.say(&FromAgent::Data { id }, &buffer[..length]);
        if length == 0 {
            return;
        }
    }
}
