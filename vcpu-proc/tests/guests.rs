//! What vcpu-proc promises the supervisor about a running machine.

mod common;

use common::{Code, Vm};
use ipc::vcpu::{VcpuEvent, VcpuRequest};

#[test]
fn a_guest_prints_on_its_serial_port() {
    let Some(mut vm) = Vm::new(1) else { return };
    vm.boot(&Code::new().print("hello\n").halt().0);
    vm.run();
    assert_eq!(vm.read_serial(6), "hello\n");
    vm.pause();
}
