//! bincode and the file descriptor table, behind two functions. Nothing else in the workspace names bincode.
//!
//! A capability ([`crate::caps`]) inside a message serializes as its index in the message's fd table. The tables live in
//! thread-local storage for the duration of one encode or decode, because serde gives serializers no context.

use crate::IpcError;
use bincode::Options;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::cell::RefCell;
use std::os::fd::{OwnedFd, RawFd};

thread_local! {
    static OUTGOING: RefCell<Vec<RawFd>> = const { RefCell::new(Vec::new()) };
    static INCOMING: RefCell<Vec<Option<OwnedFd>>> = const { RefCell::new(Vec::new()) };
}

fn options(limit: usize) -> impl Options {
    bincode::DefaultOptions::new()
        .with_fixint_encoding()
        .with_limit(limit as u64)
}

/// Encodes a message; returns its bytes and the fds that must travel with them, in table order. The fds are borrowed
/// from `message`, which must outlive their use.
pub(crate) fn encode<M: Serialize>(message: &M, limit: usize) -> Result<(Vec<u8>, Vec<RawFd>), IpcError> {
    // A first pass only measures. It fills the fd table too, so the table is emptied before the pass that counts.
    let size = options(usize::MAX)
        .serialized_size(message)
        .map_err(|error| IpcError::Codec(error.to_string()))?;
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    OUTGOING.take();
    if size > limit {
        return Err(IpcError::TooLarge { size, limit });
    }
    let mut bytes = Vec::with_capacity(size);
    let result = bincode::DefaultOptions::new()
        .with_fixint_encoding()
        .serialize_into(&mut bytes, message);
    let fds = OUTGOING.take();
    result.map_err(|error| IpcError::Codec(error.to_string()))?;
    Ok((bytes, fds))
}

/// Decodes a message that must use every byte and every fd exactly once.
pub(crate) fn decode<'a, M: Deserialize<'a>>(body: &'a [u8], fds: Vec<OwnedFd>, limit: usize) -> Result<M, IpcError> {
    let got = fds.len();
    INCOMING.replace(fds.into_iter().map(Some).collect());
    let result = options(limit).deserialize(body);
    let left = INCOMING.take().iter().filter(|slot| slot.is_some()).count();
    let message = result.map_err(|error| IpcError::Codec(error.to_string()))?;
    if left > 0 {
        return Err(IpcError::Fds {
            got,
            wanted: got - left,
        });
    }
    Ok(message)
}

/// Puts an fd into the table of the message being encoded and serializes its index.
pub(crate) fn serialize_fd<S: Serializer>(fd: RawFd, serializer: S) -> Result<S::Ok, S::Error> {
    let index = OUTGOING.with_borrow_mut(|table| {
        table.push(fd);
        table.len() - 1
    });
    u8::try_from(index)
        .map_err(|_| serde::ser::Error::custom("too many file descriptors"))?
        .serialize(serializer)
}

/// Takes the fd out of the table of the message being decoded.
pub(crate) fn deserialize_fd<'de, D: Deserializer<'de>>(deserializer: D) -> Result<OwnedFd, D::Error> {
    let index = u8::deserialize(deserializer)?;
    INCOMING
        .with_borrow_mut(|table| table.get_mut(usize::from(index)).and_then(Option::take))
        .ok_or_else(|| serde::de::Error::custom("message refers to a file descriptor that did not come with it"))
}
