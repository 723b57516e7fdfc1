//! What all channels have in common: requests, replies and events.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Names a request so that its reply can be matched. Chosen by the asker, unique among its open requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// A type that travels as one message.
pub trait Message: Serialize + DeserializeOwned {
    /// The frame's kind, distinct for every message type.
    const KIND: u16;
    /// Largest encoded size in bytes. Up to [`crate::frame::MAX_BODY_BYTES`] it is one packet; beyond, chunks.
    const MAX_BYTES: usize = crate::frame::MAX_BODY_BYTES;
}

/// A request to a helper.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request<Body> {
    /// Repeated in the reply.
    pub id: RequestId,
    /// What is asked.
    pub body: Body,
}

/// Anything a helper says.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromHelper<Reply, Event> {
    /// The one answer to a request.
    Reply {
        /// The request's id.
        id: RequestId,
        /// The answer.
        result: Result<Reply, Failure>,
    },
    /// Something that the supervisor did not ask for.
    Event(Event),
}

/// Why a helper could not do what it was asked. It is still alive and consistent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// One line that names the object and the fix.
    pub message: String,
    /// The system's error number, where there was one.
    pub errno: Option<i32>,
}

impl Failure {
    /// A failure without an error number.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            errno: None,
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self {
            message: error.to_string(),
            errno: error.raw_os_error(),
        }
    }
}
