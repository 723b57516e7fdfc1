//! Exports of our nodes, and the clients that use them.
//!
//! | room | what |
//! |---|---|
//! | this file | exports and clients of one thread |
//! | [`hub`] | which exports there are in which thread |
//! | [`negotiation`] | a client chooses an export |
//! | [`serve`] | its requests |
//!
//! The main thread negotiates. A client whose export's node lives in another thread is handed over to it.

pub mod hub;
pub mod negotiation;
pub mod serve;

use super::client::socket;
use super::context::Context;
use super::transport::{Reader, Socket, Transport, Writer};
use super::wire::export_flag;
use crate::executor::gate::Gate;
use crate::executor::io::Io;
use crate::executor::spawner::Waiters;
use crate::mailbox::Mailbox;
use crate::node::Node;
use crate::node::edge::Edge;
use hub::{Handover, Hub, Published};
use ipc::Failure;
use ipc::block::{BlockEvent, FromBlock};
use ipc::caps::NbdSocketFd;
use ipc::message::FromHelper;
use ipc::nbd::{ExportNumber, ExportSpec, MAX_NBD_CLIENTS, NbdClient};
use ipc::virtio::IoThreadIndex;
use negotiation::{Session, negotiate};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An export, in the thread that has its node.
pub struct Export {
    /// What was asked for.
    pub spec: ExportSpec,
    /// Its node.
    pub edge: Rc<Edge>,
    /// What clients can ask about ranges.
    pub contexts: Vec<Context>,
    /// Its clients.
    clients: Cell<usize>,
    changed: Waiters,
    /// No more clients.
    closing: Cell<bool>,
}

impl Export {
    /// An export without clients.
    pub fn new(spec: ExportSpec, edge: Rc<Edge>, contexts: Vec<Context>) -> Rc<Self> {
        Rc::new(Self {
            spec,
            edge,
            contexts,
            clients: Cell::new(0),
            changed: Waiters::default(),
            closing: Cell::new(false),
        })
    }

    /// Its flags, without those that depend on the client.
    pub fn flags(&self) -> u16 {
        use export_flag::{
            CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, SEND_CACHE, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES,
        };
        // All clients are served by one node: what one flushes, all see.
        let fixed = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_CACHE | CAN_MULTI_CONN;
        if self.spec.writable {
            fixed | SEND_TRIM | SEND_WRITE_ZEROES
        } else {
            fixed | READ_ONLY
        }
    }

    fn published(&self, thread: IoThreadIndex) -> Published {
        Published {
            export: self.spec.export,
            thread,
            description: self.spec.description.clone(),
            flags: self.flags(),
            bytes: self.edge.bytes(),
            min_block: u32::try_from(self.edge.limits().align).unwrap_or(1),
            contexts: self.contexts.iter().map(Context::name).collect(),
        }
    }
}

struct Client {
    transport: Weak<dyn Transport>,
    export: Option<ExportNumber>,
}

/// The exports and clients of a thread.
pub struct Exports {
    thread: IoThreadIndex,
    hub: Arc<Hub>,
    io: Rc<Io>,
    gate: Rc<Gate>,
    exports: RefCell<BTreeMap<ExportNumber, Rc<Export>>>,
    clients: RefCell<BTreeMap<NbdClient, Client>>,
    outgoing: Arc<Mailbox<FromBlock>>,
}

impl Exports {
    /// Of a thread that has none yet.
    pub fn new(
        thread: IoThreadIndex,
        hub: Arc<Hub>,
        io: Rc<Io>,
        gate: Rc<Gate>,
        outgoing: Arc<Mailbox<FromBlock>>,
    ) -> Rc<Self> {
        Rc::new(Self {
            thread,
            hub,
            io,
            gate,
            exports: RefCell::default(),
            clients: RefCell::default(),
            outgoing,
        })
    }

    /// Adds an export.
    ///
    /// # Errors
    /// When there is one of this name.
    pub fn add(&self, export: Rc<Export>) -> Result<(), Failure> {
        self.hub.publish(&export.spec.name, export.published(self.thread))?;
        self.exports.borrow_mut().insert(export.spec.export, export);
        Ok(())
    }

    /// An export.
    pub fn get(&self, export: ExportNumber) -> Option<Rc<Export>> {
        self.exports.borrow().get(&export).cloned()
    }

    /// Begins to take an export away: nobody can choose it any more, and its clients are hung up on. Ends when the last is
    /// gone.
    ///
    /// # Errors
    /// When it is not there, or has clients and may not lose them.
    pub fn remove(&self, export: ExportNumber, hard: bool) -> Result<impl Future<Output = ()> + use<>, Failure> {
        let found = self.get(export);
        let found = found.ok_or_else(|| Failure::new(format!("there is no export {}", export.0)))?;
        if found.clients.get() > 0 && !hard {
            return Err(Failure::new(format!("export '{}' still in use", found.spec.name)));
        }
        self.hub.withdraw(&found.spec.name, export);
        found.closing.set(true);
        for client in self.clients.borrow().values() {
            if client.export == Some(export) {
                client.transport.upgrade().inspect(|transport| transport.close());
            }
        }
        Ok(async move { found.changed.until(|| (found.clients.get() == 0).then_some(())).await })
    }

    /// An export is gone.
    pub fn forget(&self, export: ExportNumber) {
        self.exports.borrow_mut().remove(&export);
    }

    /// Nodes may have another size now.
    pub fn refresh(&self) {
        for export in self.exports.borrow().values() {
            self.hub.set_bytes(&export.spec.name, export.edge.bytes());
        }
    }

    /// Hangs up on all clients.
    pub fn drop_clients(&self) {
        for client in self.clients.borrow().values() {
            client.transport.upgrade().inspect(|transport| transport.close());
        }
    }

    fn gone(&self, client: NbdClient) {
        self.clients.borrow_mut().remove(&client);
        self.outgoing.put(FromHelper::Event(BlockEvent::NbdClientGone(client)));
    }

    /// A client has connected.
    ///
    /// # Errors
    /// When there are too many, or the engine has no room.
    pub fn serve(self: &Rc<Self>, client: NbdClient, fd: NbdSocketFd, handshake_s: u32) -> Result<(), Failure> {
        if self.clients.borrow().len() >= MAX_NBD_CLIENTS {
            return Err(Failure::new("there are too many NBD clients"));
        }
        let socket = socket(&self.io, fd)?;
        let transport: Rc<dyn Transport> = socket.clone();
        let entry = Client {
            transport: Rc::downgrade(&transport),
            export: None,
        };
        self.clients.borrow_mut().insert(client, entry);
        let is_over = Rc::new(Cell::new(false));
        if handshake_s > 0 {
            let (timers, late, over) = (self.io.timers().clone(), Rc::downgrade(&transport), is_over.clone());
            self.io.spawner().spawn(async move {
                timers
                    .sleep_until(Instant::now() + Duration::from_secs(handshake_s.into()))
                    .await;
                if let (false, Some(late)) = (over.get(), late.upgrade()) {
                    late.close();
                }
            });
        }
        let exports = self.clone();
        self.io.spawner().spawn(async move {
            let mut reader = Reader::new(transport.clone());
            let writer = Writer::new(transport.clone());
            let chosen = negotiate(&mut reader, &writer, &exports.hub).await;
            is_over.set(true);
            let Ok(session) = chosen else {
                transport.close();
                return exports.gone(client);
            };
            if session.thread == exports.thread {
                return exports.attend(client, session, transport, reader, writer).await;
            }
            let ahead = reader.into_ahead();
            drop(writer);
            exports.clients.borrow_mut().remove(&client);
            drop(transport);
            // Nobody else holds it: what waited has ended.
            let fd = Rc::into_inner(socket).and_then(Socket::into_fd);
            let handed = fd.is_some_and(|socket| {
                exports.hub.hand_over(Handover {
                    client,
                    socket,
                    ahead,
                    session,
                })
            });
            if !handed {
                exports.gone(client);
            }
        });
        Ok(())
    }

    /// Takes over a client of an export of this thread.
    pub fn adopt(self: &Rc<Self>, handover: Handover) {
        let Handover {
            client,
            socket: fd,
            ahead,
            session,
        } = handover;
        let Ok(transport) = socket(&self.io, NbdSocketFd::new(fd)) else {
            return self.gone(client);
        };
        let transport: Rc<dyn Transport> = transport;
        let exports = self.clone();
        self.io.spawner().spawn(async move {
            let reader = Reader::after(transport.clone(), &ahead);
            let writer = Writer::new(transport.clone());
            exports.attend(client, session, transport, reader, writer).await;
        });
    }

    /// Serves a client that has chosen, until its end.
    async fn attend(
        &self,
        client: NbdClient,
        session: Session,
        transport: Rc<dyn Transport>,
        reader: Reader,
        writer: Writer,
    ) {
        let export = self.get(session.export).filter(|export| !export.closing.get());
        let Some(export) = export.filter(|_| !transport.is_closed()) else {
            transport.close();
            return self.gone(client);
        };
        let entry = Client {
            transport: Rc::downgrade(&transport),
            export: Some(session.export),
        };
        self.clients.borrow_mut().insert(client, entry);
        export.clients.set(export.clients.get() + 1);
        let gate = self.gate.clone();
        let spawner = self.io.spawner().clone();
        serve::serve(export.clone(), session, transport, reader, writer, gate, spawner).await;
        export.clients.set(export.clients.get() - 1);
        export.changed.wake();
        self.gone(client);
    }
}
