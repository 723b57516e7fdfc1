//! NBD, both ends: a node whose bytes another program serves, and exports of our own nodes.
//!
//! | room | what |
//! |---|---|
//! | [`wire`] | numbers and headers |
//! | [`transport`] | a byte stream, read with some read-ahead, written message by message |
//! | [`client`] | the driver `nbd`: handshake, requests under way, reconnecting |
//! | [`server`] | exports: negotiation, requests of clients |
//! | [`context`] | what is known about ranges: allocation, dirty bitmaps |
//!
//! No socket is made here: the supervisor hands over connected ones. The peer is hostile in both directions. What it says is
//! checked before anything is allocated for it, what it makes us hold is bounded (a read-ahead, a few bounce buffers for each
//! client, 1,024 pieces of an answer), and whoever does not read, write or answer is hung up on or waits alone.

pub mod client;
pub mod context;
pub mod server;
pub mod transport;
pub mod wire;
