// Leaks connections from two functions. `net.connect()` connects on the next tick, when the function that
// called it has returned; so that the stack shows who it was, this calls what lies below it.
const net = require('net');
const { TCP, TCPConnectWrap, constants } = process.binding('tcp_wrap');
const open = [];

function connect(port) {
  const socket = new TCP(constants.SOCKET);
  const request = new TCPConnectWrap();
  request.oncomplete = () => {};
  if (socket.connect(request, '127.0.0.1', port)) process.exit(3);
  open.push(socket, request);
}
function leakyPool(port) { connect(port); }
function otherPool(port) { connect(port); }

const server = net.createServer((socket) => socket.on('error', () => {}).destroy());
server.listen(0, '127.0.0.1', () => {
  const { port } = server.address();
  for (let i = 0; i < 3; i++) leakyPool(port);
  for (let i = 0; i < 2; i++) otherPool(port);
  setTimeout(() => process.exit(0), 1500);
});
