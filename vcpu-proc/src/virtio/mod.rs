//! virtio over PCI, version 1.2, modern only: the registers of devices that are served elsewhere.
//!
//! This process owns what a driver programs; block-proc owns what a device does. Between them:
//!
//! ```text
//! driver                 here                                supervisor, block-proc
//! negotiates, sets queues  registers ([`transport`])
//! DRIVER_OK                ActivateDevice ───────────────────▶ takes the queues
//!                          activated(ok) ◀──────────────────── DeviceActivated
//! kicks                    ioeventfd, straight to ────────────▶ block-proc
//! interrupt                MSI-X irqfd ◀────────────────────── block-proc, straight
//! status 0                 ResetDevice ──────────────────────▶ lets go of the queues
//! polls until 0            reset_done() ◀───────────────────── DeviceReset
//! ```
//!
//! [`transport`] is the state machine of the common configuration structure, without any I/O; [`layout`] says where
//! the structures lie in the BAR and describes them to the driver; [`notify`] keeps the kicks' ioeventfds where the
//! BAR is; [`device`] puts them together as a PCI function and has the interface for the control loop.

pub mod device;
mod layout;
mod notify;
mod transport;

pub use device::VirtioPci;
